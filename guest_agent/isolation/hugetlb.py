"""Isolation on a stock kernel: free chunks are moved into the hugetlb pool.

One pass moves all free chunks, less a reserve, and keeps every one of them until
the last was acknowledged. A pass that released as it went would meet the same
chunks again and again, for the kernel hands out first what was freed last.

With `init_on_alloc` the kernel zeroes each chunk as it moves it: absent memory
becomes resident until it is punched. A pass then moves 32 chunks at a time, so
that no more than 64 MiB are ever resident for that reason alone.

Tracking: what the host acknowledged is known to be absent until the host says that
it was used again; a pass is worth its while when more chunks are free than that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from guest_agent.isolation.hugetlb_pool import HugetlbPool
from guest_agent.memory.kernel import (
    KPF_HUGE,
    PageFlags,
    free_chunk_count,
    parse_buddyinfo,
    parse_zoneinfo,
)
from guest_agent.procfs import boot_id, init_on_alloc
from hintfleet.errors import Refused, TransientError
from hintfleet.ranges import EMPTY, RangeSet

CHUNK_ORDER = 9
_CHUNK_PAGES = 1 << CHUNK_ORDER
_ZEROING_STEP_CHUNKS = 32
_SMALLEST_RESERVE_CHUNKS = 16
_RESERVE_SHARE = 16
STATE_FILE = Path("/run/hintfleet-hugetlb.json")


class HugetlbIsolator:
    """Pulls: grows the pool when it is asked for chunks and enough of them are free."""

    name = "hugetlb"

    def __init__(self, *, threshold_chunks: int, state_file: Path = STATE_FILE) -> None:
        """Nothing is changed before `start`."""
        self._threshold_chunks = threshold_chunks
        self._state_file = state_file
        self._pool = HugetlbPool()
        self._flags: PageFlags | None = None
        self._step_chunks = 1 << 30
        self._held = EMPTY
        """In the pool now, by this pass."""
        self._to_hint: list[int] = []
        """Chunks of `_held` that were not handed out yet."""
        self._out_pages = 0
        self._absent = EMPTY
        """Chunks that the host has dealt with and that were not used since."""
        self._asked = False

    def start(self, wake: Callable[[], None]) -> RangeSet:
        del wake  # the kernel calls nobody; the core's period is what drives passes
        self._flags = PageFlags()
        left = self._adopt()
        if not left:
            self._pool.check_unused()
        self._state_file.write_text(json.dumps({"boot_id": boot_id()}))
        if init_on_alloc():
            self._step_chunks = _ZEROING_STEP_CHUNKS
        self._out_pages = left.page_count
        return left

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        if not self._to_hint and not self._grow():
            return EMPTY
        count = min(max_ranges, max_pages // _CHUNK_PAGES, len(self._to_hint))
        taken, self._to_hint = self._to_hint[:count], self._to_hint[count:]
        ranges = RangeSet((pfn, _CHUNK_PAGES) for pfn in taken)
        self._out_pages += ranges.page_count
        return ranges

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        self._out_pages -= ranges.page_count
        if hinted:
            self._absent |= ranges
        else:
            self._absent -= ranges
        if not self._out_pages and not self._to_hint and not self._grow():
            self._end_pass()

    def report_now(self) -> None:
        """Make the next `isolate` begin a pass if anything at all is to be gained."""
        self._asked = True

    def idle(self) -> bool:
        return not self._to_hint and not self._out_pages and not self._worth_a_pass()

    def used_again(self, ranges: RangeSet) -> None:
        """The host says that these are resident again: they can be reclaimed once more."""
        self._absent -= _whole_chunks(ranges)

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "the kernel does not say since when a chunk is free: no policy cold with hugetlb",
                hint="policy eager or pressure",
            )

    def tracker_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._pool.close()
        if self._flags is not None:
            self._flags.close()
            self._flags = None

    # A pass

    def _grow(self) -> bool:
        """Move more chunks into the pool; whether there is something to hint."""
        self._asked = False
        room = self._free_chunks() - self._reserve_chunks()
        if not self._held and not self._worth_a_pass():
            return False
        while room > 0 and not self._to_hint:
            try:
                came = self._pool.grow(min(room, self._step_chunks))
            except TransientError:
                return False  # the pool is as it was; the pass ends with what it has
            if not came:
                break
            room -= came
            new = self._in_pool() - self._held
            self._held |= new
            self._to_hint = [
                pfn
                for start, pages in new - self._absent
                for pfn in range(start, start + pages, _CHUNK_PAGES)
            ]
        if not self._to_hint and not self._out_pages:
            self._end_pass()
        return bool(self._to_hint)

    def _end_pass(self) -> None:
        if self._held:
            self._held = EMPTY
            self._pool.empty()

    def _in_pool(self) -> RangeSet:
        """The chunks that are hugetlb pages now: all ours, for the pool is all reserved."""
        assert self._flags is not None  # noqa: S101 - start() has opened it
        return RangeSet(
            (pfn, _CHUNK_PAGES) for pfn in self._flags.chunks_with(KPF_HUGE, _spans(), CHUNK_ORDER)
        )

    # What a pass would gain

    def _worth_a_pass(self) -> bool:
        room = self._free_chunks() - self._reserve_chunks()
        gain = room - self._absent.page_count // _CHUNK_PAGES
        return gain >= (1 if self._asked else self._threshold_chunks)

    def _free_chunks(self) -> int:
        """One small read: the free lists, counted in chunks."""
        with open("/proc/buddyinfo") as file:
            return free_chunk_count(parse_buddyinfo(file.read()).values(), CHUNK_ORDER)

    def _reserve_chunks(self) -> int:
        """Free chunks to leave alone, so that growing the pool never makes the kernel
        reclaim or compact memory, and the guest can go on allocating meanwhile."""
        with open("/proc/zoneinfo") as file:
            zones = parse_zoneinfo(file.read())
        share = sum(zone.present_pages for zone in zones) // _RESERVE_SHARE
        low = sum(zone.low_watermark_pages for zone in zones)
        return max(_SMALLEST_RESERVE_CHUNKS, (share + low) // _CHUNK_PAGES)

    # An earlier agent

    def _adopt(self) -> RangeSet:
        """What an agent of this boot left in the pool, if it says that it was one of ours."""
        try:
            left_by = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return EMPTY
        if left_by != {"boot_id": boot_id()} or not self._pool.adopt():
            return EMPTY
        self._held = self._in_pool()
        return self._held


def _whole_chunks(ranges: RangeSet) -> RangeSet:
    """The chunks that any page of `ranges` lies in."""
    return RangeSet(
        (start, -(-r.end_pfn // _CHUNK_PAGES) * _CHUNK_PAGES - start)
        for r in ranges
        for start in [r.pfn & -_CHUNK_PAGES]
    )


def _spans() -> list[range]:
    """Where the guest has memory. Read anew each time: it may have been hot-plugged."""
    with open("/proc/zoneinfo") as file:
        return [
            range(zone.start_pfn, zone.start_pfn + zone.spanned_pages)
            for zone in parse_zoneinfo(file.read())
        ]

"""Isolation on a stock kernel: free chunks are moved into the hugetlb pool.

A pass moves all chunks that are free as it begins, less a reserve, and keeps every one
of them until the last was acknowledged. A pass that released as it went would meet the
same chunks again and again, for the kernel hands out first what was freed last.

With `init_on_alloc` the kernel zeroes each chunk as it moves it: absent memory becomes
resident until it is punched. Such a pass moves 32 chunks at a time, or a 64th of the
memory if that is more and fits a batch, and hints all of them: no more than that is
ever resident for that reason alone. (Each step looks at all page flags: steps of a
fixed size would cost the square of the memory.) As it zeroes all that is free, it has
to gain an eighth of that unless it is asked for, and an allowance (policy pressure)
that covers less than all that is free gains nothing there.

Tracking: what the host acknowledged is absent until the host says that it was used
again. A pass is worth its while when more chunks are free than are absent; what the
last pass could not have (the reserve) does not count. A pass costs the guest as much as
all that is free, however little it gains: after one, four times as long goes by before
the next, half a second at the most, unless one is asked for.

When the host is lost in the middle of a pass, what is in the pool stays there until
the next Welcome: the kernel does not let us choose which pages leave the pool, so
those of a batch in flight cannot be told from the others. What bounds this: passes
are short (a pass over 700 MiB holds them for about 0.1 s), one that has no batch in
flight ends by itself, and the reserve (a sixteenth of the memory and the low
watermarks) stays free for the guest, besides all that its kernel can reclaim.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from guest_agent.isolation.hugetlb_pool import CHUNK_ORDER, CHUNK_PAGES
from hintfleet.errors import Refused, TransientError
from hintfleet.ranges import EMPTY, RangeSet

_ZEROING_STEP_CHUNKS = 32
_ZEROING_GAIN_SHARE = 8
_REST_FACTOR = 4
_LONGEST_REST_S = 0.5


class Pool(Protocol):
    """The guest's kernel, as far as passes need it; see HugetlbPool."""

    def open(self) -> RangeSet: ...
    def free_chunks(self) -> int: ...
    def reserve_chunks(self) -> int: ...
    def grow(self, chunks: int) -> int: ...
    def chunks(self) -> RangeSet: ...
    def empty(self) -> None: ...
    def close(self) -> None: ...


class HugetlbIsolator:
    """Pulls: grows the pool when it is asked for chunks and enough of them are free."""

    name = "hugetlb"
    must_be_polled = True  # the kernel tells nobody of what is freed

    def __init__(
        self,
        pool: Pool,
        *,
        threshold_chunks: int,
        zeroing: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is changed before `start`.

        :param threshold_chunks: what an unasked pass has to gain.
        :param zeroing: whether the kernel writes to chunks as it moves them.
        """
        self._pool = pool
        self._threshold_chunks = threshold_chunks
        self._zeroing = zeroing
        self._held = EMPTY
        """In the pool now, by this pass."""
        self._to_hint: list[int] = []
        """First pfns of chunks of `_held` that are to be handed out."""
        self._out_pages = 0
        self._absent = EMPTY
        """Chunks that the host has dealt with and that were not used since."""
        self._reserve_chunks = 0
        self._to_move_chunks = 0
        """How many more this pass is to move."""
        self._withheld_chunks = 0
        """Beyond the reserve, free chunks that the kernel would not move in this pass."""
        self._left_behind_chunks = 0
        """Free and not absent, but the last pass could not have them."""
        self._asked = False
        self._clock = clock
        self._began_at_s = self._rest_until_s = 0.0

    def start(self, wake: Callable[[], None]) -> RangeSet:
        del wake  # the kernel calls nobody; the core's period is what drives passes
        self._began_at_s = self._clock()  # what a dead agent left is a pass of ours now
        self._held = self._pool.open()
        self._out_pages = self._held.page_count
        self._reserve_chunks = self._pool.reserve_chunks()
        return self._held

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        count = min(max_ranges, max_pages // CHUNK_PAGES)  # a chunk makes at most one range
        if not count:
            return EMPTY
        if not self._to_hint:
            self._fill(count)
        taken, self._to_hint = self._to_hint[:count], self._to_hint[count:]
        self._out_pages += len(taken) * CHUNK_PAGES
        return RangeSet((pfn, CHUNK_PAGES) for pfn in taken)

    def enough(self) -> bool:
        return True  # what is in the pool is to be hinted

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """They stay in the pool until the pass ends; nobody else can have them there."""
        self._out_pages -= ranges.page_count
        if hinted:
            self._absent |= ranges
        else:
            self._absent -= ranges
            self._to_hint += _first_pfns(ranges)

    def report_now(self) -> None:
        """Have the next `isolate` begin a pass, however little it may gain; with zeroing,
        if it gains the threshold."""
        self._asked = True

    def idle(self) -> bool:
        """Costs one small read. Ends a pass that nobody goes on with: its core may have
        used up an allowance, or have lost the host."""
        if self._out_pages:
            return True  # the pass goes on with the acks
        if self._held:
            self._end_pass()
        return not self._worth_a_pass()

    def used_again(self, ranges: RangeSet) -> None:
        self._absent -= ranges.whole_chunks(CHUNK_ORDER)

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "the kernel does not say since when a chunk is free: no policy cold with hugetlb",
                hint="policy eager or pressure",
            )

    def tracker_bytes(self) -> int:
        return sum(
            sys.getsizeof(r) + sys.getsizeof(r.pfn) + sys.getsizeof(r.page_count)
            for r in self._absent
        )

    def close(self) -> None:
        self._pool.close()

    # A pass

    def _fill(self, wanted_chunks: int) -> None:
        """Begin a pass or go on with one, until there is something to hint; end it if there
        is nothing more and nothing is out."""
        if self._zeroing and self._out_pages:
            return  # what was zeroed before must be punched first
        if not self._held and not self._begins():
            return
        step = self._to_move_chunks
        if self._zeroing:
            # The reserve is a sixteenth of the memory.
            step = min(max(_ZEROING_STEP_CHUNKS, self._reserve_chunks // 4), wanted_chunks)
        while not self._to_hint and (chunks := min(self._to_move_chunks, step)) > 0:
            self._move(chunks)
        if not self._to_hint and not self._out_pages:
            self._end_pass()

    def _begins(self) -> bool:
        worth = self._worth_a_pass()
        self._asked = False
        if worth:
            self._began_at_s = self._clock()
            self._reserve_chunks = self._pool.reserve_chunks()
            self._to_move_chunks = self._room_chunks()
            self._withheld_chunks = 0
        return worth

    def _move(self, chunks: int) -> None:
        """Move so many into the pool, if they are still free."""
        self._to_move_chunks -= chunks
        chunks = min(chunks, max(0, self._room_chunks()))
        try:
            came = self._pool.grow(chunks)
        except TransientError:
            self._to_move_chunks = 0  # the pool is as it was, and the next pass tries again
            return
        self._withheld_chunks += chunks - came
        new = self._pool.chunks() - self._held
        self._held |= new
        self._to_hint = _first_pfns(new if self._zeroing else new - self._absent)

    def _end_pass(self) -> None:
        free = min(self._pool.free_chunks(), self._reserve_chunks + self._withheld_chunks)
        # Of the absent chunks outside the pool, those that are free are among `free`.
        self._left_behind_chunks = free - _chunk_count(self._absent - self._held)
        self._to_hint, self._held, self._to_move_chunks = [], EMPTY, 0
        self._pool.empty()
        now_s = self._clock()
        rest_s = min(_REST_FACTOR * (now_s - self._began_at_s), _LONGEST_REST_S)
        self._rest_until_s = now_s + rest_s

    # What a pass would gain

    def _room_chunks(self) -> int:
        return self._pool.free_chunks() - self._reserve_chunks

    def _worth_a_pass(self) -> bool:
        if not self._asked and self._clock() < self._rest_until_s:
            return False
        room = self._room_chunks()
        if room <= 0:
            return False
        free = room + self._reserve_chunks
        gain = free - _chunk_count(self._absent) - self._left_behind_chunks
        if self._asked and not self._zeroing:
            return True
        # A guest is never quite still: to zero all that is free for a chunk or two would
        # go on for ever.
        costs = self._zeroing and not self._asked
        least = room // _ZEROING_GAIN_SHARE if costs else 0
        return gain >= max(self._threshold_chunks, least)


def _chunk_count(ranges: RangeSet) -> int:
    return ranges.page_count // CHUNK_PAGES


def _first_pfns(ranges: RangeSet) -> list[int]:
    return [pfn for start, pages in ranges for pfn in range(start, start + pages, CHUNK_PAGES)]

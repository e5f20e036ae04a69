"""A Linux-like buddy allocator: the memory of an embedded guest.

It has zones, orders 0 to MAX_ORDER, splitting and merging as in mm/page_alloc.c, and low and min
watermarks. It also has what the two designs of the kernel's mailing list in 2019 (README.md) need:
a hook in the free path that is called for each chunk that became free (Lal), and a mark on free
blocks that were reported (Duyck; PageReported in mm/page_reporting.h). Chunks can be isolated and
released, pages onlined and offlined. Not covered: per-CPU lists, migrate types, compaction,
reclaim. So an allocation that finds no free block large enough can only wait for the release of
isolated chunks; it fails if there are none, or after a timeout.

The allocator manages page frames only; their contents are in the guest's RAM file.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hintfleet.ranges import RangeSet
from hintfleet.settings import MAX_ORDER
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

FreeHook = Callable[["Zone", int], None]
"""Called with the zone and the first pfn of a chunk that has just become wholly free. It runs
under the allocator's lock: it must be quick, and must not call what takes that lock."""


@dataclass(frozen=True, kw_only=True)
class ZoneSpec:
    """The description of a zone.

    :ivar present: which pages exist; the span of a sparse zone has holes.
    :ivar node: NUMA node.
    """

    name: str
    present: RangeSet
    node: int = 0


class Zone:
    """The free lists of one zone. Takes no lock: a caller that changes them must hold the lock of
    the allocator."""

    def __init__(self, spec: ZoneSpec, chunk_order: int) -> None:
        self.name = spec.name
        self.node = spec.node
        self.free_page_count = 0
        # A dict keeps insertion order, so each list is a stack: the block freed last is
        # allocated first, as in the kernel, which puts it at the head of the free list.
        self.free_area: list[dict[int, None]] = [{} for _ in range(MAX_ORDER + 1)]
        # The first pfns of the wholly free chunks without the reported mark. The kernel has no such
        # list: it keeps these blocks at the head of each free list.
        self.unreported: dict[int, None] = {}
        self._chunk_order = chunk_order
        self.resize(spec.present)

    def __repr__(self) -> str:
        return f"Zone({self.name!r}, node={self.node})"

    def resize(self, present: RangeSet) -> None:
        """Set the pages that the zone has, and its watermarks; leave the free lists unchanged."""
        self.present = present
        # As mm/page_alloc.c for one zone of less than 1 GiB: min_free_kbytes = sqrt(16 * kilobytes
        # of memory) (calculate_min_free_kbytes), low = min + min / 4 (__setup_per_zone_wmarks). In
        # larger zones the kernel's low watermark is higher.
        present_kib = present.page_count * 4
        self.min_watermark_pages = int((present_kib * 16) ** 0.5) // 4
        self.low_watermark_pages = self.min_watermark_pages * 5 // 4

    def take(self, order: int) -> int | None:
        """Take a block of `order` out of the smallest free block that is large enough, but out of
        chunks with the reported mark last.

        The kernel puts them at the tail of its free lists (mm/page_alloc.c:
        __putback_isolated_page, FPI_TO_TAIL): the host has no memory behind them. Here even
        unmarked chunks in larger blocks are taken before marked ones.

        Return the first pfn of the taken block; None if no free block is large enough.
        """
        parts = range(order, self._chunk_order)
        pfn = self._first_free(parts)
        if pfn is None and order <= self._chunk_order and self.unreported:
            pfn = next(reversed(self.unreported))
        if pfn is None:
            pfn = self._first_free(range(max(order, self._chunk_order), MAX_ORDER + 1))
        if pfn is not None:
            self.take_at(pfn, order)
        return pfn

    def _first_free(self, orders: range) -> int | None:
        lists = (self.free_area[order] for order in orders)
        return next((next(reversed(blocks)) for blocks in lists if blocks), None)

    def take_at(self, pfn: int, order: int) -> bool:
        """Take exactly this block; return False, with nothing done, if it is not wholly free."""
        containing = self.containing_block(pfn, order)
        if containing is not None:
            self._split(*containing, pfn, order)
        return containing is not None

    def containing_block(self, pfn: int, order: int) -> tuple[int, int] | None:
        """Return first pfn and order of the free block that contains this aligned block.

        None if this block is not wholly free.
        """
        for have in range(order, MAX_ORDER + 1):
            head = pfn & -(1 << have)
            if head in self.free_area[have]:
                return head, have
        return None

    def put(self, pfn: int, order: int, *, reported: bool = False) -> int:
        """Free a block, merge it with its free buddies, and return the order of the result."""
        # Each chunk has its own mark, which it keeps when blocks merge or are split. Here we differ
        # from the kernel: there a block has one mark, which is dropped then, and such memory is
        # reported once more.
        put_pfn, put_order = pfn, order
        while order < MAX_ORDER:
            buddy = pfn ^ 1 << order
            if buddy not in self.free_area[order]:
                break
            self._remove(buddy, order)
            pfn &= buddy
            order += 1
        self._insert(pfn, order)
        if order >= self._chunk_order and not reported:
            self.unreported.update(dict.fromkeys(self._chunks(put_pfn, put_order)))
        return order

    def _chunks(self, pfn: int, order: int) -> range:
        """Return the first pfns of the chunks that this block consists of, or is a part of."""
        return range(pfn & -(1 << self._chunk_order), pfn + (1 << order), 1 << self._chunk_order)

    def _split(self, head: int, have: int, pfn: int, order: int) -> None:
        """Take the block at `pfn`, of `order`, out of the free block at `head`, of order `have`.

        The rest of the free block stays free.
        """
        self._remove(head, have)
        for chunk in self._chunks(pfn, order):
            self.unreported.pop(chunk, None)
        while have > order:
            have -= 1
            half = head + (1 << have)
            if pfn < half:
                self._insert(half, have)
            else:
                self._insert(head, have)
                head = half

    def _insert(self, pfn: int, order: int) -> None:
        self.free_area[order][pfn] = None
        self.free_page_count += 1 << order

    def _remove(self, pfn: int, order: int) -> None:
        del self.free_area[order][pfn]
        self.free_page_count -= 1 << order


class BuddyAllocator:
    """The zones of a guest behind one lock. Safe to use from several threads."""

    def __init__(self, zones: Iterable[ZoneSpec], *, chunk_order: int) -> None:
        """Make all present pages free, with the reported mark and without calling the hook: the
        host has no memory behind them yet.

        :param chunk_order: log2 of the pages in a chunk, 0 to MAX_ORDER.
        """
        self.zones = tuple(Zone(spec, chunk_order) for spec in zones)
        self.chunk_order = chunk_order
        self.isolated_page_count = 0
        self.used_page_count = 0
        self._peak_page_count = 0
        self.on_chunk_free: FreeHook = _untracked
        self._lock = threading.Lock()
        self._pages_returned = threading.Condition(self._lock)
        for zone in self.zones:
            for pfn, order in _aligned_blocks(zone.present):
                zone.put(pfn, order, reported=True)

    @property
    def free_page_count(self) -> int:
        """Free pages of all zones; isolated ones are not free."""
        return sum(zone.free_page_count for zone in self.zones)

    def allocate(self, order: int, *, timeout_s: float = 1.0) -> int:
        """Take a block of 2**order pages and return its first pfn.

        If no such block is free but chunks are isolated, wait for their release.

        :param timeout_s: how long to wait for isolated chunks to be released.
        :raises MemoryError: even after the wait, no zone has such a block above its min watermark.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while (found := self._allocate(order)) is None and self.isolated_page_count:
                if not self._pages_returned.wait(deadline - time.monotonic()):
                    break
            if found is not None:
                self.used_page_count += 1 << order
                self._peak_page_count = max(self._peak_page_count, self.used_page_count)
        if found is None:
            raise MemoryError(f"no free block of order {order}")
        return found

    def used_pages(self) -> tuple[int, int]:
        """Return how many pages are in use now, and the most at any time since the last call."""
        with self._lock:
            peak, self._peak_page_count = self._peak_page_count, self.used_page_count
            return self.used_page_count, peak

    def memory_use(self, isolated_pages: int) -> pb.MemoryUse:
        """Return what the memory is used for. Each figure is counted by itself: none is what the
        others leave. Costs one step for each order and zone.

        :param isolated_pages: `isolated_page_count`, as the isolator returns it.
        """
        with self._lock:
            free_by_order = [
                sum(len(zone.free_area[order]) for zone in self.zones) << order
                for order in range(MAX_ORDER + 1)
            ]
            return pb.MemoryUse(
                total_bytes=sum(zone.present.page_count for zone in self.zones) * PAGE_BYTES,
                used_bytes=self.used_page_count * PAGE_BYTES,
                free_chunks_bytes=sum(free_by_order[self.chunk_order :]) * PAGE_BYTES,
                free_pieces_bytes=sum(free_by_order[: self.chunk_order]) * PAGE_BYTES,
                isolated_bytes=isolated_pages * PAGE_BYTES,
            )

    def _allocate(self, order: int) -> int | None:
        for zone in reversed(self.zones):  # as in the kernel's zonelist: highest zone first
            if zone.free_page_count - (1 << order) >= zone.min_watermark_pages:
                found = zone.take(order)
                if found is not None:
                    return found
        return None

    def free(self, pfn: int, order: int) -> None:
        """Free a block; call the hook for each chunk that becomes wholly free by this call."""
        zone = self.zone_of(pfn)
        with self._lock:
            self.used_page_count -= 1 << order
            merged_order = zone.put(pfn, order)
            if merged_order >= self.chunk_order:
                first = pfn & -(1 << self.chunk_order)
                for chunk in range(first, pfn + (1 << order), 1 << self.chunk_order):
                    self.on_chunk_free(zone, chunk)
            self._pages_returned.notify_all()

    def isolation_budget_chunks(self, zone: Zone) -> int:
        """Return how many chunks can be isolated so that the zone keeps its low watermark free."""
        # mm/page_reporting.c (page_reporting_process_zone) keeps to the low watermark, too: so
        # isolation never takes the guest's last free memory.
        spare = zone.free_page_count - zone.low_watermark_pages
        return max(0, spare >> self.chunk_order)

    def isolate(self, zone: Zone, pfn: int) -> bool:
        """Isolate one chunk; return False, with nothing done, if it is not wholly free."""
        with self._lock:
            if not zone.take_at(pfn, self.chunk_order):
                return False
            self.isolated_page_count += 1 << self.chunk_order
            return True

    def unreported_chunks(self, zone: Zone, max_chunks: int) -> list[int]:
        """Return the first pfns of up to `max_chunks` free chunks without the reported mark.

        Those that were freed first are returned first: they would be allocated last. (The kernel
        takes them from the head of each free list: mm/page_reporting.c.) The cost depends on
        `max_chunks`, not on the length of the free lists.
        """
        with self._lock:
            return list(itertools.islice(zone.unreported, max_chunks))

    def unreported_chunk_count(self) -> int:
        """Return how many chunks of all zones are wholly free and not marked as reported."""
        return sum(len(zone.unreported) for zone in self.zones)

    def release(self, ranges: RangeSet, *, reported: bool) -> None:
        """Free isolated chunks without calling the hook: nobody has used them.

        :param reported: whether to mark them as reported.
        """
        with self._lock:
            for pfn, page_count in ranges:
                # Chunk by chunk: a range may cover the end of one zone and the start of the next.
                for chunk in range(pfn, pfn + page_count, 1 << self.chunk_order):
                    self.zone_of(chunk).put(chunk, self.chunk_order, reported=reported)
            self.isolated_page_count -= ranges.page_count
            self._pages_returned.notify_all()

    def online(self, zone: Zone, pages: RangeSet) -> None:
        """Hot-plug: add free pages to a zone.

        The pages are marked as reported, and the hook is not called: the host has no memory behind
        them yet.

        :raises ValueError: some of the pages are in a zone already.
        """
        with self._lock:
            if any(pages & other.present for other in self.zones):
                raise ValueError("pages are online already")
            zone.resize(zone.present | pages)
            for pfn, order in _aligned_blocks(pages):
                zone.put(pfn, order, reported=True)
            self._pages_returned.notify_all()

    def offline(self, pages: RangeSet, *, timeout_s: float = 1.0) -> None:
        """Hot-unplug: remove free pages from their zones.

        If some are not free but chunks are isolated, wait for the release of chunks.

        :raises MemoryError: some of the pages are not free in time; nothing has changed.
        :raises ValueError: some of the pages are in no zone; nothing has changed.
        """
        deadline_s = time.monotonic() + timeout_s
        # Free buddies are always merged, so an aligned block is wholly free if and only if one
        # free block contains it.
        blocks = [(self.zone_of(pfn), pfn, order) for pfn, order in _aligned_blocks(pages)]
        with self._lock:
            while not all(zone.containing_block(pfn, order) for zone, pfn, order in blocks):
                if not self.isolated_page_count or not self._pages_returned.wait(
                    deadline_s - time.monotonic()
                ):
                    raise MemoryError(f"some of the {pages.page_count} pages are in use")
            for zone, pfn, order in blocks:
                zone.take_at(pfn, order)
            for zone in {zone for zone, _, _ in blocks}:
                zone.resize(zone.present - pages)

    def zone_of(self, pfn: int) -> Zone:
        """Return the zone of a page frame.

        :raises ValueError: the page frame is in no zone.
        """
        for zone in self.zones:
            if pfn in zone.present:
                return zone
        raise ValueError(f"pfn {pfn} is in no zone")


def _untracked(_zone: Zone, _pfn: int) -> None:
    """Do nothing: the free hook until an isolator sets one."""


def _aligned_blocks(present: RangeSet) -> Iterable[tuple[int, int]]:
    """Yield the largest aligned blocks that a set of pages consists of: (pfn, order)."""
    for pfn, page_count in present:
        end = pfn + page_count
        while pfn < end:
            align = (pfn & -pfn).bit_length() - 1 if pfn else MAX_ORDER
            order = min(align, (end - pfn).bit_length() - 1, MAX_ORDER)
            yield pfn, order
            pfn += 1 << order

"""A Linux-like buddy allocator: the memory of an embedded guest.

Zones, orders 0 to MAX_ORDER, splitting and merging as in mm/page_alloc.c, low and
min watermarks, and what both designs of the 2019 thread need: a hook in the free
path that tells which chunks became free (Lal), and a mark on free blocks that were
reported (Duyck; PageReported in mm/page_reporting.h). Not covered: per-CPU lists, migrate types,
compaction, reclaim; an allocation that does not fit fails.

It hands out page frames only; what is in them lies in the guest's RAM file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hintfleet.ranges import RangeSet
from hintfleet.settings import MAX_ORDER

FreeHook = Callable[["Zone", int], None]
"""Called with the zone and the first pfn of a chunk that has just become wholly
free, under the allocator's lock: it must be quick and not call back."""


@dataclass(frozen=True, kw_only=True)
class ZoneSpec:
    """What a zone is made of.

    :ivar present: pages that exist; a sparse zone spans more than it has.
    :ivar node: NUMA node.
    """

    name: str
    present: RangeSet
    node: int = 0


class Zone:
    """Free lists of one zone. Not locked: the allocator does that."""

    def __init__(self, spec: ZoneSpec, chunk_order: int) -> None:
        self.name = spec.name
        self.node = spec.node
        self.free_page_count = 0
        # Insertion order makes each a stack: the block freed last is allocated first,
        # as the kernel does with the head of a free list.
        self.free_area: list[dict[int, None]] = [{} for _ in range(MAX_ORDER + 1)]
        # Free blocks of at least a chunk that do not bear the mark, with their orders:
        # the kernel keeps them at the head of each free list.
        self.unreported: dict[int, int] = {}
        self.unreported_page_count = 0
        self._chunk_order = chunk_order
        self.resize(spec.present)

    def __repr__(self) -> str:
        return f"Zone({self.name!r}, node={self.node})"

    def resize(self, present: RangeSet) -> None:
        """The zone has these pages from now on; its watermarks follow."""
        self.present = present
        # mm/page_alloc.c init_per_zone_wmark_min: sqrt-shaped; low = min + min/4.
        present_kib = present.page_count * 4
        self.min_watermark_pages = int((present_kib * 16) ** 0.5) // 4
        self.low_watermark_pages = self.min_watermark_pages * 5 // 4

    def take(self, order: int) -> int | None:
        """Take a block of `order` from the smallest block that has one; None if none has."""
        for have in range(order, MAX_ORDER + 1):
            if self.free_area[have]:
                pfn = next(reversed(self.free_area[have]))
                self._split(pfn, have, pfn, order)
                return pfn
        return None

    def take_at(self, pfn: int, order: int) -> bool:
        """Take exactly this block out of whatever free block holds it; False if not free."""
        held = self.holder(pfn, order)
        if held is not None:
            self._split(*held, pfn, order)
        return held is not None

    def holder(self, pfn: int, order: int) -> tuple[int, int] | None:
        """First pfn and order of the free block that holds this aligned block, if one does."""
        for have in range(order, MAX_ORDER + 1):
            head = pfn & -(1 << have)
            if head in self.free_area[have]:
                return head, have
        return None

    def put(self, pfn: int, order: int, *, reported: bool = False) -> int:
        """Free a block, merge it with its buddies, and return the order it ended in.

        The result bears the reported mark if all its parts did. (The kernel drops the
        mark whenever blocks merge or are split, and reports such memory once more.)
        """
        while order < MAX_ORDER:
            buddy = pfn ^ 1 << order
            if buddy not in self.free_area[order]:
                break
            reported &= self._remove(buddy, order)
            pfn &= buddy
            order += 1
        self._insert(pfn, order, reported)
        return order

    def _split(self, head: int, have: int, pfn: int, order: int) -> None:
        """Take the block `pfn` out of the free block `head`; what is left stays free."""
        reported = self._remove(head, have)
        while have > order:
            have -= 1
            half = head + (1 << have)
            if pfn < half:
                self._insert(half, have, reported)
            else:
                self._insert(head, have, reported)
                head = half

    def _insert(self, pfn: int, order: int, reported: bool) -> None:
        self.free_area[order][pfn] = None
        self.free_page_count += 1 << order
        if order >= self._chunk_order and not reported:
            self.unreported[pfn] = order
            self.unreported_page_count += 1 << order

    def _remove(self, pfn: int, order: int) -> bool:
        """Take a whole block off its list; whether it bore the reported mark."""
        del self.free_area[order][pfn]
        self.free_page_count -= 1 << order
        if order < self._chunk_order:
            return False
        if pfn not in self.unreported:
            return True
        del self.unreported[pfn]
        self.unreported_page_count -= 1 << order
        return False


class BuddyAllocator:
    """The zones of a guest behind one lock. Safe to use from several threads."""

    def __init__(self, zones: Iterable[ZoneSpec], *, chunk_order: int) -> None:
        """All present pages start out free and unreported to the hook.

        :param chunk_order: the order at which the free hook is told, 0 to MAX_ORDER.
        """
        self.zones = tuple(Zone(spec, chunk_order) for spec in zones)
        self.chunk_order = chunk_order
        self.isolated_page_count = 0
        self.on_chunk_free: FreeHook = _ignore
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        for zone in self.zones:
            for pfn, order in _blocks(zone.present):
                zone.put(pfn, order)

    @property
    def free_page_count(self) -> int:
        """Free pages of all zones; isolated ones are not free."""
        return sum(zone.free_page_count for zone in self.zones)

    def allocate(self, order: int, *, patience_s: float = 1.0) -> int:
        """Take a block of 2**order pages and return its first pfn.

        If none is free but some are isolated, waits for those to come back.

        :raises MemoryError: no zone has such a block above its min watermark.
        """
        deadline = time.monotonic() + patience_s
        with self._lock:
            while (found := self._allocate(order)) is None and self.isolated_page_count:
                if not self._returned.wait(deadline - time.monotonic()):
                    break
        if found is None:
            raise MemoryError(f"no free block of order {order}")
        return found

    def _allocate(self, order: int) -> int | None:
        for zone in reversed(self.zones):  # the kernel's zonelist: highest zone first
            if zone.free_page_count - (1 << order) >= zone.min_watermark_pages:
                found = zone.take(order)
                if found is not None:
                    return found
        return None

    def free(self, pfn: int, order: int) -> None:
        """Give a block back; the hook hears of each chunk that is now wholly free."""
        zone = self.zone_of(pfn)
        with self._lock:
            merged_order = zone.put(pfn, order)
            if merged_order >= self.chunk_order:
                first = pfn & -(1 << self.chunk_order)
                for chunk in range(first, pfn + (1 << order), 1 << self.chunk_order):
                    self.on_chunk_free(zone, chunk)
            self._returned.notify_all()

    def isolation_budget_chunks(self, zone: Zone) -> int:
        """Chunks that can be isolated before the zone falls below its low watermark.

        mm/page_reporting.c keeps the same distance, so that isolation never
        starves the guest.
        """
        spare = zone.free_page_count - zone.low_watermark_pages
        return max(0, spare >> self.chunk_order)

    def isolate(self, zone: Zone, pfn: int) -> bool:
        """Take one chunk out of use; False, and nothing done, if it is not wholly free."""
        with self._lock:
            if not zone.take_at(pfn, self.chunk_order):
                return False
            self.isolated_page_count += 1 << self.chunk_order
            return True

    def unreported_chunks(self, zone: Zone, max_chunks: int) -> list[int]:
        """First pfns of free chunks that do not bear the reported mark, newest blocks first.

        What a pass of mm/page_reporting.c looks at; it stops after `max_chunks`, so
        its cost does not grow with the free lists.
        """
        found: list[int] = []
        with self._lock:
            for pfn in reversed(zone.unreported):
                end = pfn + (1 << zone.unreported[pfn])
                found += range(pfn, end, 1 << self.chunk_order)
                if len(found) >= max_chunks:
                    break
        return found[:max_chunks]

    def release(self, ranges: RangeSet, *, reported: bool) -> None:
        """Put isolated chunks back; the hook is not called: they hold nothing new.

        :param reported: whether they get the mark.
        """
        with self._lock:
            for pfn, page_count in ranges:
                # Chunk by chunk: a range may run from the end of one zone into the next.
                for chunk in range(pfn, pfn + page_count, 1 << self.chunk_order):
                    self.zone_of(chunk).put(chunk, self.chunk_order, reported=reported)
            self.isolated_page_count -= ranges.page_count
            self._returned.notify_all()

    def online(self, zone: Zone, pages: RangeSet) -> None:
        """Hot-plug: add pages to a zone; they are free, and the hook hears of no chunk,
        for they hold nothing.

        :raises ValueError: some of them are there already.
        """
        with self._lock:
            if any(pages & other.present for other in self.zones):
                raise ValueError("pages are online already")
            zone.resize(zone.present | pages)
            for pfn, order in _blocks(pages):
                zone.put(pfn, order, reported=True)
            self._returned.notify_all()

    def offline(self, pages: RangeSet, *, patience_s: float = 1.0) -> None:
        """Hot-unplug: take pages out of their zones. Waits for those that are isolated.

        :raises MemoryError: some of them are in use; nothing has changed.
        :raises ValueError: some of them are in no zone.
        """
        deadline_s = time.monotonic() + patience_s
        # Free blocks are always merged, so an aligned block is free as a whole exactly
        # if one free block holds it.
        blocks = [(self.zone_of(pfn), pfn, order) for pfn, order in _blocks(pages)]
        with self._lock:
            while not all(zone.holder(pfn, order) for zone, pfn, order in blocks):
                if not self.isolated_page_count or not self._returned.wait(
                    deadline_s - time.monotonic()
                ):
                    raise MemoryError(f"some of the {pages.page_count} pages are in use")
            for zone, pfn, order in blocks:
                zone.take_at(pfn, order)
            for zone in {zone for zone, _, _ in blocks}:
                zone.resize(zone.present - pages)

    def zone_of(self, pfn: int) -> Zone:
        """The zone that holds a page frame.

        :raises ValueError: no zone has it.
        """
        for zone in self.zones:
            if pfn in zone.present:
                return zone
        raise ValueError(f"pfn {pfn} is in no zone")


def _ignore(_zone: Zone, _pfn: int) -> None:
    """The hook of an allocator that nobody tracks."""


def _blocks(present: RangeSet) -> Iterable[tuple[int, int]]:
    """The largest aligned blocks that fill a set of pages: (pfn, order)."""
    for pfn, page_count in present:
        end = pfn + page_count
        while pfn < end:
            align = (pfn & -pfn).bit_length() - 1 if pfn else MAX_ORDER
            order = min(align, (end - pfn).bit_length() - 1, MAX_ORDER)
            yield pfn, order
            pfn += 1 << order

"""A Linux-like buddy allocator: the memory of an embedded guest.

Zones, orders 0 to MAX_ORDER, splitting and merging as in mm/page_alloc.c, low and
min watermarks, and the hook of the 2019 thread in the free path: it tells the
tracker which chunks became free. Not covered: per-CPU lists, migrate types,
compaction, reclaim; an allocation that does not fit fails.

It hands out page frames only; what is in them lies in the guest's RAM file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hintfleet.ranges import RangeSet

MAX_ORDER = 10
"""The largest order, inclusive (as in Linux since 6.4): blocks of 4 MiB."""

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

    def __init__(self, spec: ZoneSpec) -> None:
        self.name = spec.name
        self.node = spec.node
        self.present = spec.present
        self.free_page_count = 0
        # Insertion order makes each a stack: the block freed last is allocated first,
        # as the kernel does with the head of a free list.
        self.free_area: list[dict[int, None]] = [{} for _ in range(MAX_ORDER + 1)]
        # mm/page_alloc.c init_per_zone_wmark_min: sqrt-shaped; low = min + min/4.
        present_kib = spec.present.page_count * 4
        self.min_watermark_pages = int((present_kib * 16) ** 0.5) // 4
        self.low_watermark_pages = self.min_watermark_pages * 5 // 4

    def __repr__(self) -> str:
        return f"Zone({self.name!r}, node={self.node})"

    def take(self, order: int) -> int | None:
        """Take a block of `order` from the smallest block that has one; None if none has."""
        for have in range(order, MAX_ORDER + 1):
            if self.free_area[have]:
                pfn, _ = self.free_area[have].popitem()
                self.free_page_count -= 1 << order
                self._put_back_halves(pfn, have, pfn, order)
                return pfn
        return None

    def take_at(self, pfn: int, order: int) -> bool:
        """Take exactly this block out of whatever free block holds it; False if not free."""
        for have in range(order, MAX_ORDER + 1):
            head = pfn & -(1 << have)
            if head in self.free_area[have]:
                del self.free_area[have][head]
                self.free_page_count -= 1 << order
                self._put_back_halves(head, have, pfn, order)
                return True
        return False

    def put(self, pfn: int, order: int) -> int:
        """Free a block, merge it with its buddies, and return the order it ended in."""
        self.free_page_count += 1 << order
        while order < MAX_ORDER:
            buddy = pfn ^ 1 << order
            if buddy not in self.free_area[order]:
                break
            del self.free_area[order][buddy]
            pfn &= buddy
            order += 1
        self.free_area[order][pfn] = None
        return order

    def _put_back_halves(self, head: int, have: int, pfn: int, order: int) -> None:
        """Free what is left of the block `head` after `pfn` was taken out of it."""
        while have > order:
            have -= 1
            half = head + (1 << have)
            if pfn < half:
                self.free_area[have][half] = None
            else:
                self.free_area[have][head] = None
                head = half


class BuddyAllocator:
    """The zones of a guest behind one lock. Safe to use from several threads."""

    def __init__(self, zones: Iterable[ZoneSpec], *, chunk_order: int) -> None:
        """All present pages start out free and unreported to the hook.

        :param chunk_order: the order at which the free hook is told, 0 to MAX_ORDER.
        """
        self.zones = tuple(Zone(spec) for spec in zones)
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

    def release(self, ranges: RangeSet) -> None:
        """Put isolated chunks back. The hook is not called: they hold nothing new."""
        with self._lock:
            for pfn, page_count in ranges:
                # Chunk by chunk: a range may run from the end of one zone into the next.
                for chunk in range(pfn, pfn + page_count, 1 << self.chunk_order):
                    self.zone_of(chunk).put(chunk, self.chunk_order)
            self.isolated_page_count -= ranges.page_count
            self._returned.notify_all()

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

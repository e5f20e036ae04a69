"""Isolation in an embedded guest: trackers find free chunks, the buddy allocator isolates them."""

from __future__ import annotations

from collections.abc import Callable

from guest_agent.isolation.isolator import HeldBack, UsedPages, nothing_held_back
from guest_agent.memory.buddy import BuddyAllocator, Zone
from guest_agent.tracking import BitmapTracker, ReportedTracker, Tracker
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import IsolatorKind, TrackerKind

TRACKERS: dict[TrackerKind, Callable[[BuddyAllocator, Zone], Tracker]] = {
    TrackerKind.BITMAP: lambda allocator, _zone: BitmapTracker(allocator.chunk_order),
    TrackerKind.REPORTED: ReportedTracker,
}


class EmbeddedIsolator:
    """Takes free chunks from the buddy allocator when `isolate` is called: those that wait in the
    trackers of all zones, except as many as are held back."""

    name = IsolatorKind.EMBEDDED
    unfinished = False
    must_be_polled = False

    def __init__(
        self,
        allocator: BuddyAllocator,
        *,
        tracker: TrackerKind = TrackerKind.BITMAP,
        threshold_chunks: int,
    ) -> None:
        """Make a tracker for each zone of `allocator`, and set the allocator's free hook.

        :param threshold_chunks: wake the core again when so many chunks of one zone wait, and as
            many of all zones are not held back. The first one wakes it, too.
        """
        self._allocator = allocator
        self._threshold_chunks = threshold_chunks
        self._chunk_pages = 1 << allocator.chunk_order
        self._trackers = {zone: TRACKERS[tracker](allocator, zone) for zone in allocator.zones}
        self._held_back: HeldBack = nothing_held_back
        self._held_back_chunks = self._quiet_chunks = 0
        self._wakes = 0
        self._wake: Callable[[], None] = lambda: None
        allocator.on_chunk_free = self._on_chunk_free

    def start(self, wake: Callable[[], None], held_back: HeldBack = nothing_held_back) -> RangeSet:
        self._wake = wake
        self._held_back = held_back
        return EMPTY  # an embedded guest dies with its agent, so no chunk is left isolated

    def _on_chunk_free(self, zone: Zone, pfn: int) -> None:
        self._trackers[zone].mark(pfn)
        # This runs in the allocator's free path, so wake the event loop at most twice between two
        # calls of `isolate` (while memory is held back, of `enough_ready`, too): for the first
        # chunk beyond what is held back, or would be if the memory in use were freed (this starts
        # the period), and at the threshold.
        if self._allocator.unreported_chunk_count() <= self._quiet_chunks:
            return
        wakes_due = 2 if self._enough_spare() else 1
        if self._wakes < wakes_due:
            self._wakes = wakes_due
            self._wake()

    def enough_ready(self) -> bool:
        self._update_held_back()
        if self._held_back_chunks:
            # Allow new wakes: perhaps `isolate` is not called before more is free than is held
            # back.
            self._wakes = 0
        return self._enough_spare()

    def used_pages(self) -> UsedPages:
        return UsedPages(*self._allocator.used_pages())

    def _update_held_back(self) -> None:
        held = self._held_back(self.used_pages())
        self._held_back_chunks = held.free // self._chunk_pages
        self._quiet_chunks = (held.free + held.in_use) // self._chunk_pages

    def _enough_spare(self) -> bool:
        waiting = max(tracker.waiting_count for tracker in self._trackers.values())
        return min(waiting, self._spare_chunks()) >= self._threshold_chunks

    def _spare_chunks(self) -> int:
        """Return how many free chunks that may be resident are not held back; negative if there
        are fewer of them than should be held back."""
        # A chunk can wait in a bitmap and be in use again; none of these is counted here.
        return self._allocator.unreported_chunk_count() - self._held_back_chunks

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        self._wakes = 0
        self._update_held_back()
        # A chunk makes at most one range, so one bound on chunks keeps to both bounds.
        max_chunks = min(max_ranges, max_pages // self._chunk_pages, self._spare_chunks())
        isolated: list[tuple[int, int]] = []
        for zone, tracker in self._trackers.items():
            while len(isolated) < max_chunks:
                budget = self._allocator.isolation_budget_chunks(zone)
                candidates = tracker.take(min(max_chunks - len(isolated), budget))
                if not candidates:
                    break
                isolated += [
                    (pfn, self._chunk_pages)
                    for pfn in candidates
                    if self._allocator.isolate(zone, pfn)
                ]
        return RangeSet(isolated)

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        if not hinted:
            # Before they are free: then the workload's thread may unplug them at once.
            for pfn, page_count in ranges:
                for chunk in range(pfn, pfn + page_count, self._chunk_pages):
                    self._trackers[self._allocator.zone_of(chunk)].mark(chunk)
        self._allocator.release(ranges, reported=hinted)

    def report_now(self, *, thorough: bool) -> None:
        """Do nothing: `isolate` finds all chunks that wait, without preparation."""

    def refaulted(self, ranges: RangeSet) -> None:
        """Do nothing: when a refaulted chunk is freed, the free hook tells the tracker."""

    def idle(self) -> bool:
        self._update_held_back()
        return self._spare_chunks() <= 0 or not any(
            tracker.waiting_count and self._allocator.isolation_budget_chunks(zone)
            for zone, tracker in self._trackers.items()
        )

    def isolated_pages(self) -> int:
        return self._allocator.isolated_page_count

    def tracker_bytes(self) -> int:
        return sum(tracker.memory_bytes() for tracker in self._trackers.values())

    def close(self) -> None:
        """Do nothing: no file is open."""

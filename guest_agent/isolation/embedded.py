"""Isolation in an embedded guest: the emulated buddy's own, fed by either tracker."""

from __future__ import annotations

from collections.abc import Callable

from guest_agent.memory.buddy import BuddyAllocator, Zone
from guest_agent.tracking import BitmapTracker, ReportedTracker, Tracker
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import IsolatorKind, TrackerKind

TRACKERS: dict[TrackerKind, Callable[[BuddyAllocator, Zone], Tracker]] = {
    TrackerKind.BITMAP: lambda allocator, _zone: BitmapTracker(allocator.chunk_order),
    TrackerKind.REPORTED: ReportedTracker,
}


class EmbeddedIsolator:
    """Pulls: scans the trackers of all zones when it is asked for chunks."""

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
        """Track `allocator` from now on.

        :param threshold_chunks: waiting chunks that wake the core without being asked.
        """
        self._allocator = allocator
        self._threshold_chunks = threshold_chunks
        self._chunk_pages = 1 << allocator.chunk_order
        self._trackers = {zone: TRACKERS[tracker](allocator, zone) for zone in allocator.zones}
        self._wakes = 0
        self._wake: Callable[[], None] = lambda: None
        allocator.on_chunk_free = self._on_chunk_free

    def start(self, wake: Callable[[], None]) -> RangeSet:
        self._wake = wake
        return EMPTY  # an embedded guest dies with its agent, and what was isolated with it

    def _on_chunk_free(self, zone: Zone, pfn: int) -> None:
        self._trackers[zone].mark(pfn)
        # One wake for the first chunk, and one when there are enough of them.
        wakes_due = 2 if self.enough() else 1
        if self._wakes < wakes_due:
            self._wakes = wakes_due
            self._wake()

    def enough(self) -> bool:
        return any(t.waiting_count >= self._threshold_chunks for t in self._trackers.values())

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        self._wakes = 0
        # A chunk makes at most one range, so that bounding chunks bounds both.
        room = min(max_ranges, max_pages // self._chunk_pages)
        isolated: list[tuple[int, int]] = []
        for zone, tracker in self._trackers.items():
            while len(isolated) < room:
                budget = self._allocator.isolation_budget_chunks(zone)
                candidates = tracker.take(min(room - len(isolated), budget))
                if not candidates:
                    break
                isolated += [
                    (pfn, self._chunk_pages)
                    for pfn in candidates
                    if self._allocator.isolate(zone, pfn)
                ]
        return RangeSet(isolated)

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        self._allocator.release(ranges, reported=hinted)
        if not hinted:
            for pfn, page_count in ranges:
                for chunk in range(pfn, pfn + page_count, self._chunk_pages):
                    self._trackers[self._allocator.zone_of(chunk)].mark(chunk)

    def report_now(self, *, thorough: bool) -> None:
        """Nothing to do: what is free is marked already."""

    def only_cold(self, after_s: float) -> None:
        for tracker in self._trackers.values():
            tracker.only_cold(after_s)

    def used_again(self, ranges: RangeSet) -> None:
        """Nothing to do: the allocator itself notices what is freed."""

    def idle(self) -> bool:
        return not any(
            tracker.waiting_count and self._allocator.isolation_budget_chunks(zone)
            for zone, tracker in self._trackers.items()
        )

    def tracker_bytes(self) -> int:
        return sum(tracker.memory_bytes() for tracker in self._trackers.values())

    def close(self) -> None:
        """Nothing to let go of."""

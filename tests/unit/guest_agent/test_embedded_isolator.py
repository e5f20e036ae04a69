"""The embedded isolator: which chunks it isolates, which it leaves, which it isolates again, and
when it wakes the core."""

import pytest

from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.isolation.isolator import HeldPages
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import TrackerKind

CHUNK = 512
CHUNKS = 64


@pytest.fixture(params=TrackerKind)
def tracker(request: pytest.FixtureRequest) -> TrackerKind:
    return TrackerKind(request.param)


@pytest.fixture
def allocator() -> BuddyAllocator:
    zones = [
        ZoneSpec(name="DMA32", present=RangeSet([(0, CHUNKS * CHUNK)])),
        ZoneSpec(name="Normal", node=1, present=RangeSet([(CHUNKS * CHUNK, CHUNKS * CHUNK)])),
    ]
    return BuddyAllocator(zones, chunk_order=9)


def tracking(allocator: BuddyAllocator, tracker: TrackerKind) -> EmbeddedIsolator:
    """Return an isolator for which no chunk waits: it has isolated and released all that waited."""
    isolator = EmbeddedIsolator(allocator, tracker=tracker, threshold_chunks=16)
    drain(isolator)
    return isolator


def freed(allocator: BuddyAllocator, chunks: int) -> RangeSet:
    """Allocate `chunks` chunks, free them, and return their ranges."""
    pfns = [allocator.allocate(9) for _ in range(chunks)]
    for pfn in pfns:
        allocator.free(pfn, 9)
    return RangeSet((pfn, CHUNK) for pfn in pfns)


def drain(isolator: EmbeddedIsolator, max_ranges: int = 512) -> RangeSet:
    """Isolate and release until `isolate` returns nothing; return all ranges that it returned."""
    seen = EMPTY
    while ranges := isolator.isolate(max_ranges, 1 << 20):
        seen |= ranges
        isolator.release(ranges, hinted=True)
    return seen


def test_exactly_the_freed_chunks_are_isolated(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    chunks = freed(allocator, 40)
    assert drain(isolator) == chunks
    assert isolator.idle()
    assert not drain(isolator), "released chunks are not new"


def test_no_batch_has_more_ranges_than_asked_for(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    held = sorted(allocator.allocate(9) for _ in range(24))
    for pfn in held[::2]:  # no two of them are neighbours
        allocator.free(pfn, 9)
    seen = EMPTY
    while ranges := isolator.isolate(5, 100 * CHUNK):
        assert len(ranges) <= 5
        seen |= ranges
    assert seen == RangeSet((pfn, CHUNK) for pfn in held[::2])


def test_no_batch_has_more_pages_than_asked_for(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    """Version 11 of Lal's patches sent stale ranges in a partial last batch."""
    isolator = tracking(allocator, tracker)
    chunks = freed(allocator, 24)
    sizes = []
    seen = EMPTY
    while ranges := isolator.isolate(10, 7 * CHUNK):
        assert len(ranges) <= 10
        assert not ranges & seen, "a partial last batch repeats an earlier one"
        sizes.append(ranges.page_count // CHUNK)
        seen |= ranges
    assert sizes == [7, 7, 7, 3]
    assert seen == chunks


def test_chunks_used_again_before_the_scan_are_not_isolated(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    chunks = freed(allocator, 20)
    used = RangeSet((allocator.allocate(9), CHUNK) for _ in range(8))
    assert drain(isolator) == chunks - used


def test_chunks_that_the_host_did_not_act_on_are_isolated_again(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    freed(allocator, 20)
    ranges = isolator.isolate(512, 1 << 20)
    isolator.release(ranges, hinted=False)
    assert not isolator.idle()
    assert drain(isolator) == ranges


def test_it_wakes_the_core_at_the_threshold(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    woken: list[bool] = []
    isolator.start(lambda: woken.append(True))
    freed(allocator, 14)
    assert len(woken) == 1, "for the first chunk: a period begins"
    assert not isolator.enough_ready()
    freed(allocator, 16)
    assert len(woken) == 2
    assert isolator.enough_ready()


def test_a_zone_at_its_watermark_keeps_its_bits_for_later(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    """A chunk that may not be isolated now must not be forgotten."""
    isolator = tracking(allocator, tracker)
    chunks = freed(allocator, CHUNKS)
    for zone in allocator.zones:
        zone.low_watermark_pages = 8 * CHUNK
    held = RangeSet()
    while part := isolator.isolate(512, 1 << 20):
        held |= part
    assert isolator.idle(), "no more can be isolated before those are released"
    assert chunks - held, "the watermark kept some back"
    isolator.release(held, hinted=True)
    assert not chunks - drain(isolator) - held


def test_each_chunk_of_a_range_over_two_zones_is_released_into_its_own(
    tracker: TrackerKind,
) -> None:
    """Version 11 of Lal's patches had one bitmap for the zones of one type on all NUMA nodes."""
    pages = 8 * CHUNK
    zones = [
        ZoneSpec(name="Normal", node=node, present=RangeSet([(node * pages, pages)]))
        for node in (0, 1)
    ]
    allocator = BuddyAllocator(zones, chunk_order=9)
    isolator = EmbeddedIsolator(allocator, tracker=tracker, threshold_chunks=1)
    for zone in allocator.zones:
        zone.low_watermark_pages = zone.min_watermark_pages = 0
    blocks = [allocator.allocate(10) for _ in range(8)]
    for pfn in blocks:
        allocator.free(pfn, 10)
    free_before = [zone.free_page_count for zone in allocator.zones]
    ranges = isolator.isolate(512, 1 << 20)
    assert list(ranges) == [(0, 2 * pages)], "one range, over both zones"
    isolator.release(ranges, hinted=True)
    assert [zone.free_page_count for zone in allocator.zones] == free_before


def test_a_set_bit_of_an_offline_chunk_is_ignored(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    """Version 11 of Lal's patches looped for ever over the bit of a chunk that was unplugged."""
    isolator = tracking(allocator, tracker)
    chunks = freed(allocator, 40)
    gone = RangeSet([(2 * CHUNKS * CHUNK - 16 * CHUNK, 16 * CHUNK)])
    allocator.offline(gone)
    assert drain(isolator) == chunks - gone
    assert isolator.idle()
    allocator.online(allocator.zones[1], gone)
    assert allocator.free_page_count == 2 * CHUNKS * CHUNK


def test_as_much_stays_unhinted_as_is_held_back(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    held_pages = 12 * CHUNK
    isolator.start(lambda: None, lambda _: HeldPages(held_pages, 0))
    chunks = freed(allocator, 40)
    hinted = drain(isolator)
    assert hinted.page_count == chunks.page_count - held_pages
    assert isolator.idle()
    assert freed(allocator, 12) == chunks - hinted, "what is resident is used first"
    assert isolator.idle()
    held_pages = 0
    assert not isolator.idle()
    assert drain(isolator) == chunks - hinted


def test_chunks_that_may_be_resident_are_allocated_before_those_that_were_hinted(
    allocator: BuddyAllocator, tracker: TrackerKind
) -> None:
    isolator = tracking(allocator, tracker)
    taken = [allocator.allocate(9) for _ in range(20)]
    for pfn in taken[::2]:
        allocator.free(pfn, 9)
    again = sorted(allocator.allocate(9) for _ in range(10))
    assert again == sorted(taken[::2])
    for pfn in again:
        allocator.free(pfn, 9)
    assert sorted(allocator.allocate(0) & -CHUNK for _ in range(10 * CHUNK))[::CHUNK] == again
    assert isolator.idle()


def test_chunks_that_are_unplugged_as_soon_as_they_are_free(tracker: TrackerKind) -> None:
    """The workload's thread waits for just these chunks to unplug them."""

    class Unplugged(BuddyAllocator):
        def release(self, ranges: RangeSet, *, reported: bool) -> None:
            super().release(ranges, reported=reported)
            self.offline(ranges)

    zone = ZoneSpec(name="Normal", present=RangeSet([(0, CHUNKS * CHUNK)]))
    allocator = Unplugged([zone], chunk_order=9)
    isolator = EmbeddedIsolator(allocator, tracker=tracker, threshold_chunks=16)
    freed(allocator, 1)
    ranges = isolator.isolate(1, CHUNK)
    isolator.release(ranges, hinted=False)
    assert not ranges & allocator.zones[0].present
    assert not isolator.isolate(CHUNKS, 1 << 20) & ranges

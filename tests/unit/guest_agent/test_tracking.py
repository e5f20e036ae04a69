"""The bitmap tracker has the design of version 11 of Lal's kernel patches, but not their bugs."""

from hypothesis import given
from hypothesis import strategies as st

from guest_agent.tracking import BitmapTracker

ORDER = 9
chunks = st.sets(st.integers(0, 1 << 20), max_size=200)


def pfns(numbers: set[int]) -> set[int]:
    return {number << ORDER for number in numbers}


@given(chunks, st.integers(1, 50))
def test_every_marked_chunk_is_taken_exactly_once(marked: set[int], at_once: int) -> None:
    tracker = BitmapTracker(ORDER)
    for pfn in pfns(marked):
        tracker.mark(pfn)
        tracker.mark(pfn)
    assert tracker.waiting_count == len(marked)
    taken: list[int] = []
    while batch := tracker.take(at_once):
        assert len(batch) <= at_once
        taken += batch
    assert sorted(taken) == sorted(pfns(marked))
    assert tracker.waiting_count == 0


@given(chunks, chunks)
def test_chunks_freed_during_a_scan_are_found_by_the_next(first: set[int], then: set[int]) -> None:
    """In version 11 of Lal's patches, a chunk that was freed where the scan had already been was
    not hinted before the next free."""
    tracker = BitmapTracker(ORDER)
    for pfn in pfns(first):
        tracker.mark(pfn)
    taken = tracker.take(len(first) // 2)
    for pfn in pfns(then):
        tracker.mark(pfn)
    left = set()
    while batch := tracker.take(16):
        left |= set(batch)
    assert left == (pfns(first) - set(taken)) | pfns(then)


def test_a_sparse_zone_costs_only_its_present_chunks() -> None:
    """The bitmap of version 11 of Lal's patches had a bit for each chunk of the zone's span, holes
    included: 1 TiB cost 64 KiB, and each scan read all of it."""
    tracker = BitmapTracker(ORDER)
    for n in range(16):
        tracker.mark(n * (1 << 28) // 16)
    assert tracker.memory_bytes() < 2048
    assert len(tracker.take(1000)) == 16
    assert tracker.memory_bytes() < 1024

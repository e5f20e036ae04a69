"""The embedded allocator never loses a page and never allocates one twice. Also its hook, its
watermarks, its waits for isolated chunks, and plugged memory."""

import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from guest_agent.memory.buddy import BuddyAllocator, Zone, ZoneSpec
from hintfleet.ranges import RangeSet
from hintfleet.settings import MAX_ORDER
from hintfleet.units import PAGE_BYTES
from tests.support.agents import HANG_S

CHUNK_ORDER = 9
CHUNK = 1 << CHUNK_ORDER
# Two zones on two nodes. The second zone has a hole, and a partial chunk before the hole.
ZONES = (
    ZoneSpec(name="DMA32", present=RangeSet([(0, 16 * CHUNK)])),
    ZoneSpec(
        name="Normal",
        node=1,
        present=RangeSet([(32 * CHUNK, 9 * CHUNK + 77), (64 * CHUNK, 4 * CHUNK)]),
    ),
)
ALL = RangeSet([one for zone in ZONES for one in zone.present])


def free_ranges(allocator: BuddyAllocator) -> RangeSet:
    blocks = [
        (pfn, 1 << order)
        for zone in allocator.zones
        for order, area in enumerate(zone.free_area)
        for pfn in area
    ]
    ranges = RangeSet(blocks)
    assert ranges.page_count == sum(count for _, count in blocks), "free blocks overlap"
    return ranges


class BuddyMachine(RuleBasedStateMachine):
    blocks = Bundle("blocks")
    isolated = Bundle("isolated")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BuddyAllocator(ZONES, chunk_order=CHUNK_ORDER)
        self.allocator.on_chunk_free = self.chunk_became_free
        self.before = free_ranges(self.allocator)
        self.held = RangeSet()
        self.marked: list[int] = []

    def chunk_became_free(self, zone: Zone, pfn: int) -> None:
        assert RangeSet([(pfn, CHUNK)]) - zone.present == RangeSet(), (
            "the hook was called with absent pages"
        )
        self.marked.append(pfn)

    @rule(target=blocks, order=st.integers(0, MAX_ORDER))
    def allocate(self, order: int) -> tuple[int, int] | None:
        try:
            pfn = self.allocator.allocate(order, timeout_s=0)
        except MemoryError:
            return None
        block = RangeSet([(pfn, 1 << order)])
        assert not pfn % (1 << order), "not aligned"
        assert not block & self.held, "allocated twice"
        assert not block - ALL, "does not exist"
        self.held |= block
        return pfn, order

    @rule(block=consumes(blocks))
    def free(self, block: tuple[int, int] | None) -> None:
        if block is None:
            return
        pfn, order = block
        self.marked.clear()
        self.allocator.free(pfn, order)
        self.held -= RangeSet([(pfn, 1 << order)])
        free = free_ranges(self.allocator)
        chunks = range(pfn & -CHUNK, pfn + (1 << order), CHUNK)
        whole = [c for c in chunks if not RangeSet([(c, CHUNK)]) - free]
        assert self.marked == whole, "the hook is called for exactly the chunks that became free"

    @rule(target=isolated, chunk=st.integers(0, 70))
    def isolate(self, chunk: int) -> int | None:
        pfn = chunk * CHUNK
        zone = next((z for z in self.allocator.zones if pfn in z.present), None)
        wanted = RangeSet([(pfn, CHUNK)])
        was_free = not wanted - free_ranges(self.allocator)
        if zone is None:
            return None
        assert self.allocator.isolate(zone, pfn) == was_free
        if not was_free:
            return None
        self.held |= wanted
        return pfn

    @rule(pfn=consumes(isolated), reported=st.booleans())
    def release(self, pfn: int | None, reported: bool) -> None:
        if pfn is None:
            return
        self.marked.clear()
        self.allocator.release(RangeSet([(pfn, CHUNK)]), reported=reported)
        self.held -= RangeSet([(pfn, CHUNK)])
        assert not self.marked, "a released chunk must not be hinted again"

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        free = free_ranges(self.allocator)
        assert free.page_count == self.allocator.free_page_count
        assert not free & self.held
        assert free | self.held == ALL

    @invariant()
    def each_page_has_one_use(self) -> None:
        free = free_ranges(self.allocator)
        isolated_pages = self.allocator.isolated_page_count
        use = self.allocator.memory_use(isolated_pages)
        assert use.total_bytes == ALL.page_count * PAGE_BYTES
        assert use.used_bytes == (self.held.page_count - isolated_pages) * PAGE_BYTES
        assert use.isolated_bytes == isolated_pages * PAGE_BYTES
        whole = [c for c in range(0, 70 * CHUNK, CHUNK) if not RangeSet([(c, CHUNK)]) - free]
        assert use.free_chunks_bytes == len(whole) * CHUNK * PAGE_BYTES
        assert use.free_pieces_bytes == (free.page_count - len(whole) * CHUNK) * PAGE_BYTES


TestBuddy = BuddyMachine.TestCase
TestBuddy.settings = settings(max_examples=40, stateful_step_count=40)


def small(chunks: int) -> BuddyAllocator:
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, chunks * CHUNK)]))
    return BuddyAllocator([zone], chunk_order=CHUNK_ORDER)


def test_freeing_everything_merges_back_to_the_largest_blocks() -> None:
    allocator = small(8)
    taken = [allocator.allocate(0) for _ in range(1000)]
    for pfn in taken:
        allocator.free(pfn, 0)
    assert [len(area) for area in allocator.zones[0].free_area] == [0] * MAX_ORDER + [4]


def test_isolation_stops_at_the_low_watermark() -> None:
    allocator = small(64)
    zone = allocator.zones[0]
    while allocator.isolation_budget_chunks(zone):
        assert allocator.isolate(zone, next(iter(zone.free_area[9] or zone.free_area[10])))
    assert zone.low_watermark_pages <= zone.free_page_count < zone.low_watermark_pages + CHUNK


def test_allocation_waits_for_isolated_chunks() -> None:
    allocator = small(64)
    zone = allocator.zones[0]
    for chunk in range(64):
        assert allocator.isolate(zone, chunk * CHUNK)
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(allocator.allocate(9, timeout_s=HANG_S)))
    waiter.start()
    time.sleep(0.05)
    assert not got
    allocator.release(RangeSet([(0, 32 * CHUNK)]), reported=True)
    waiter.join(HANG_S)
    assert got


def test_an_allocation_that_does_not_fit_fails_at_once() -> None:
    allocator = small(8)
    with pytest.raises(MemoryError):  # at once: there is no isolated chunk to wait for
        list(iter(lambda: allocator.allocate(MAX_ORDER, timeout_s=3600), None))


def test_hot_plugged_memory_can_be_used_and_merges_with_its_neighbours() -> None:
    allocator = small(7)
    (zone,) = allocator.zones
    allocator.online(zone, RangeSet([(7 * CHUNK, 9 * CHUNK)]))
    assert allocator.free_page_count == 16 * CHUNK
    assert [len(area) for area in zone.free_area] == [0] * MAX_ORDER + [8]
    assert allocator.unreported_chunk_count() == 0, "the host has no memory behind what is new"
    with pytest.raises(ValueError, match="online already"):
        allocator.online(zone, RangeSet([(0, 1)]))


def test_memory_in_use_cannot_be_unplugged() -> None:
    allocator = small(8)
    pfn = allocator.allocate(0)
    before = free_ranges(allocator)
    with pytest.raises(MemoryError, match="in use"):
        allocator.offline(RangeSet([(0, 8 * CHUNK)]))
    assert free_ranges(allocator) == before
    allocator.free(pfn, 0)
    allocator.offline(RangeSet([(4 * CHUNK, 4 * CHUNK)]))
    assert free_ranges(allocator) == RangeSet([(0, 4 * CHUNK)])


def test_unplugging_waits_for_isolated_chunks() -> None:
    allocator = small(8)
    assert allocator.isolate(allocator.zones[0], 5 * CHUNK)
    isolated = RangeSet([(5 * CHUNK, CHUNK)])
    releaser = threading.Timer(0.1, lambda: allocator.release(isolated, reported=True))
    releaser.start()
    allocator.offline(RangeSet([(4 * CHUNK, 4 * CHUNK)]), timeout_s=10)
    assert free_ranges(allocator) == RangeSet([(0, 4 * CHUNK)])
    releaser.join()

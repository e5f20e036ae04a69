"""When an agent tells its host about its guest's memory: at most once per second while 1 MiB or
more changes, and every 10 s at rest."""

from guest_agent.holding_back import HoldingBack
from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.telemetry import TelemetryPace
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

CHUNK = 512


class Agent:
    """The telemetry of a guest of 64 chunks. Counts how often the use of its memory is read."""

    def __init__(self) -> None:
        zone = ZoneSpec(name="Normal", present=RangeSet([(0, 64 * CHUNK)]))
        self.allocator = BuddyAllocator([zone], chunk_order=9)
        self.isolator = EmbeddedIsolator(self.allocator, threshold_chunks=1)
        self.rule = HoldingBack(64 * CHUNK, CHUNK)
        self.uses_read = 0
        self.pace = TelemetryPace(
            lambda: self.allocator.free_page_count * PAGE_BYTES,
            self.memory_use,
            self.isolator,
            self.rule,
        )

    def memory_use(self, isolated_pages: int) -> pb.MemoryUse:
        self.uses_read += 1
        return self.allocator.memory_use(isolated_pages)


def test_the_memory_is_looked_at_only_for_a_message() -> None:
    agent = Agent()
    told = [now_s for now_s in range(31) if agent.pace.if_due(now_s, 0) is not None]
    assert told == [0, 10, 20, 30], "at rest, once in ten seconds"
    assert agent.uses_read == 4


def test_what_the_host_has_acknowledged_is_told_though_as_much_is_free_again() -> None:
    agent = Agent()
    assert agent.pace.if_due(0, 0) is not None
    chunks = RangeSet([(0, 2 * CHUNK)])
    for pfn in (0, CHUNK):
        assert agent.allocator.isolate(agent.allocator.zones[0], pfn)
    in_flight = agent.pace.if_due(1, 0)
    assert in_flight is not None
    assert in_flight.memory.isolated_bytes == 4 * MIB
    agent.allocator.release(chunks, reported=True)
    back = agent.pace.if_due(2, 2 * CHUNK)
    assert back is not None
    assert back.memory.isolated_bytes == 0
    assert agent.pace.if_due(3, 2 * CHUNK) is None, "nothing has happened since"
    assert agent.pace.if_due(4, 3 * CHUNK) is not None, "a chunk more was acknowledged"


def test_what_is_held_back_is_told_with_its_end() -> None:
    agent = Agent()
    agent.rule.set_policy(5, learns=False)
    agent.rule.observe(0, 8 * CHUNK)
    agent.rule.observe(1, 0)
    first = agent.pace.if_due(2, 0)
    assert first is not None
    assert (first.held_back_bytes, first.held_back_for_ms) == (16 * MIB, 4000)
    later = agent.pace.if_due(7, 0)
    assert later is not None
    assert (later.held_back_bytes, later.held_back_for_ms) == (0, 0)

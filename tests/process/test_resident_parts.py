"""What the resident memory of an embedded guest consists of, with a real agent: the parts add up,
and each has the size that follows from what the guest was told to do."""

import time
from collections.abc import Callable

import pytest

from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from tests.support.agents import HostAgent, wait_until

BLOCK = 64 << 10
Parts = host_pb2.ResidentParts


def checked(parts: Parts) -> Parts:
    """Check that `parts`, with the unexplained bytes, add up to the resident bytes; return them."""
    sizes = (
        *(parts.used_bytes, parts.file_cache_bytes, parts.free_pieces_bytes),
        *(parts.held_back_bytes, parts.in_flight_bytes, parts.waiting_bytes),
    )
    assert sum(sizes) + parts.unexplained_bytes == parts.resident_bytes
    return parts


def explained(parts: Parts) -> bool:
    return abs(checked(parts).unexplained_bytes) <= parts.resident_bytes / 100


def at_rest(host: HostAgent, is_so: Callable[[Parts], bool], what: str) -> Parts:
    """Wait until the parts of all that is resident now satisfy `is_so`; return them."""
    found: list[Parts] = []

    def is_found() -> bool:
        guest = host.guests()["g"]
        parts = guest.resident_parts
        is_current = parts.resident_bytes == guest.ledger.resident_bytes
        if guest.HasField("resident_parts") and is_current and is_so(checked(parts)):
            found.append(parts)
        return bool(found)

    wait_until(is_found, what)
    return found[0]


def with_policy(policy: str, **settings: int) -> host_pb2.HintingSettings:
    return host_pb2.HintingSettings(policy=policy, report_period_ms=50, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["eager", "adaptive", "cold", "pressure"])
def test_the_parts_are_what_is_resident_under_load_and_at_rest(
    host_agent: HostAgent, policy: str
) -> None:
    """The guest has chunks that come and go, fragments, and memory that stays. So much stays that
    a chunk which is being written is less than 1 % of all."""
    host_agent.watch()
    host_agent.create(hinting=with_policy(policy), memory_bytes=512 * MIB)
    host_agent.allocate(256 * MIB)
    host_agent.allocate(32 * MIB, block_bytes=BLOCK)
    host_agent.free(72 * MIB)  # a quarter of the extents (64 MiB), and of the small blocks
    host_agent.loop(hinting_pb2.Loop.CHURN, size_bytes=64 * MIB, duration_ms=6000)
    busy = [
        sample.resident_parts
        for one in host_agent.samples
        for sample in one.samples
        if sample.HasField("resident_parts")
    ]
    assert len({parts.used_bytes for parts in busy}) > 2, "the samples are of a guest at work"
    assert not [parts for parts in busy if not explained(parts)]
    parts = at_rest(host_agent, lambda one: one.used_bytes == 216 * MIB, "the guest to say so")
    assert explained(parts)
    assert parts.file_cache_bytes == 0, "an embedded guest has no page cache"
    assert parts.free_pieces_bytes == 8 * MIB, "what was freed between blocks that are held"
    if policy == "pressure":
        assert parts.waiting_bytes >= 64 * MIB, "nothing is wanted back"
    if policy == "eager":
        assert parts.waiting_bytes == parts.held_back_bytes == 0


def test_what_is_held_back_is_told_with_its_end(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("cold", cold_after_ms=3_600_000))
    host_agent.allocate(96 * MIB)
    host_agent.free(64 * MIB)
    parts = at_rest(host_agent, lambda one: one.held_back_bytes == 64 * MIB, "what is held back")
    assert (parts.used_bytes, parts.waiting_bytes) == (32 * MIB, 0)
    assert 3_000_000 < parts.held_back_for_ms <= 3_600_000
    before = parts.held_back_for_ms
    time.sleep(0.1)
    later = host_agent.guests()["g"].resident_parts
    assert later.held_back_for_ms < before, "it is from now, not from the telemetry"


def test_nothing_is_claimed_of_a_guest_that_does_not_tell(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(method=host_pb2.NONE)
    host_agent.allocate(64 * MIB)
    guest = host_agent.guests()["g"]
    assert not guest.HasField("resident_parts")
    assert MIB < guest.process_rss_bytes < 64 * MIB, "its Python, without its RAM"

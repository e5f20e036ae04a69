"""Policies cold and pressure decide when freed memory leaves the host, with real agents."""

import time

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HostAgent, running_host_agent, wait_until

HELD = 96 * MIB
FREED = 64 * MIB


def resident_bytes(host: HostAgent) -> int:
    return host.guests()["g"].ledger.resident_bytes


def with_policy(policy: str, **settings: int) -> host_pb2.HintingSettings:
    return host_pb2.HintingSettings(policy=policy, report_period_ms=50, **settings)  # type: ignore[arg-type]


def test_cold_memory_leaves_only_when_it_has_been_free_for_long(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("cold", cold_after_ms=1500))
    host_agent.allocate(HELD)
    freed_at_s = time.monotonic()
    host_agent.free(FREED)
    while True:
        found_bytes = resident_bytes(host_agent)
        if time.monotonic() > freed_at_s + 1.2:  # soon the freed memory is cold
            break
        assert found_bytes == HELD
        time.sleep(0.1)
    wait_until(lambda: resident_bytes(host_agent) == HELD - FREED, "cold memory to leave")


def test_memory_that_is_soon_used_again_never_leaves_when_cold(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("cold", cold_after_ms=3000))
    for _ in range(8):
        host_agent.allocate(HELD)
        host_agent.free(HELD)
    assert host_agent.guests()["g"].ledger.hinted_total_bytes == 0


def test_without_pressure_memory_stays(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("pressure"))
    host_agent.allocate(HELD)
    host_agent.free(FREED)
    time.sleep(1.5)
    assert resident_bytes(host_agent) == HELD
    refusals = host_agent.samples[-1].samples[0].refusals
    assert set(refusals) == {"no_pressure"}, "the reason why nothing was allowed is recorded"


def test_under_pressure_as_much_comes_back_as_is_wanted() -> None:
    with running_host_agent("--memory-budget", "80MiB") as host:
        host.watch()
        host.create(hinting=with_policy("pressure", pressure_percent=75))
        host.allocate(HELD)
        host.free(FREED)
        threshold = 60 * MIB
        wait_until(lambda: resident_bytes(host) <= threshold, "the excess to come back")
        time.sleep(1)
        assert resident_bytes(host) > threshold - 4 * MIB, "and not much more"

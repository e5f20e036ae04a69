"""Policies decide when freed memory comes back to the host, with real agents."""

import time

from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
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


def churn(host: HostAgent) -> int:
    """Use and free FREED over and over for a while; return how many bytes were refaults."""
    before_bytes = host.guests()["g"].ledger.refaulted_total_bytes
    host.loop(hinting_pb2.Loop.CHURN, size_bytes=FREED, duration_ms=3000, pause_ms=200)
    return host.guests()["g"].ledger.refaulted_total_bytes - before_bytes


def test_what_a_guest_uses_again_at_once_stays_until_its_habit_ends(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("adaptive", break_even_ms=4000))
    churn(host_agent)
    assert churn(host_agent) <= FREED, "one regret at most, where eager has fifteen"
    wait_until(lambda: host_agent.samples[-1].samples[0].held_back_bytes > 0, "what is held")
    wait_until(lambda: resident_bytes(host_agent) == 0, "all of it to leave, without a settle")


def test_what_was_used_once_leaves_at_once(host_agent: HostAgent) -> None:
    """Memory that the guest took piece by piece comes back at once, too: the host reports each
    piece as used, but that is no sign of a habit."""
    host_agent.watch()
    host_agent.create(hinting=with_policy("adaptive", break_even_ms=3_600_000))
    for _ in range(8):
        host_agent.allocate(HELD // 8)
        time.sleep(0.1)
    host_agent.free(FREED)
    wait_until(lambda: resident_bytes(host_agent) == HELD - FREED, "memory used once to leave")


def test_a_full_host_lets_nothing_be_held_back() -> None:
    with running_host_agent("--memory-budget", "24MiB") as host:
        host.watch()
        host.create(hinting=with_policy("adaptive", break_even_ms=3_600_000))
        for _ in range(2):
            churn(host)
        wait_until(lambda: resident_bytes(host) <= 20 * MIB, "what is over the threshold to leave")


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


def test_a_paused_guest_hints_nothing_until_the_pause_ends(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(hinting=with_policy("eager"))
    host_agent.allocate(HELD)
    host_agent.pause_hinting(600)
    host_agent.free(FREED)
    assert host_agent.settle().hinted_bytes == 0, "not even when it is asked to"
    assert resident_bytes(host_agent) == HELD
    paused = host_agent.guests()["g"]
    assert paused.not_hinting_because.startswith("paused for another ")
    assert 0 < host_agent.pause_hinting(0.2) <= 600
    wait_until(lambda: resident_bytes(host_agent) == HELD - FREED, "hinting to go on by itself")
    assert host_agent.guests()["g"].epoch == paused.epoch, "in the same session"

"""When a host has run out of memory, by its samples."""

from typing import Any

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from orchestrator.trial.budget_watch import BudgetWatch, describe


def samples(at_us: int = 1, **use: Any) -> host_pb2.SampleSet:
    use = {"limit_bytes": 100 * MIB} | use
    return host_pb2.SampleSet(at_unix_us=at_us, budget_use=host_pb2.BudgetUse(**use))


def test_a_kill_in_the_cgroup_counts_and_not_one_of_an_earlier_trial() -> None:
    watch = BudgetWatch()
    watch.take(samples(enforced=True, oom_count=3, used_bytes=200 * MIB))
    assert not watch.ran_out.is_set()
    watch.take(samples(at_us=7, enforced=True, oom_count=4, used_bytes=90 * MIB))
    watch.take(samples(at_us=8, enforced=True, oom_count=5, used_bytes=10 * MIB))
    assert watch.ran_out.is_set()
    event = watch.event("host1", "t")
    assert (event.at_unix_us, event.used_bytes, event.enforced) == (7, 90 * MIB, True)
    assert "host1: ran out of memory" in describe(event)
    assert "the kernel had no more for their cgroup" in describe(event)


def test_without_a_cgroup_more_than_the_budget_is_too_much() -> None:
    watch = BudgetWatch()
    watch.take(samples(used_bytes=100 * MIB))
    assert not watch.ran_out.is_set()
    assert watch.used_bytes == 100 * MIB
    watch.take(samples(used_bytes=100 * MIB + 4096))
    assert watch.ran_out.is_set()
    assert "more than its 100 MiB: they used 100 MiB" in describe(watch.event("host1", "t"))


def test_a_host_that_is_still_swapping_out_is_over_its_budget() -> None:
    watch = BudgetWatch()
    watch.take(samples(enforced=True, used_bytes=130 * MIB))
    assert watch.is_over
    assert not watch.ran_out.is_set()
    watch.take(samples(enforced=True, used_bytes=100 * MIB + 4096))
    assert not watch.is_over


def test_a_host_agent_that_says_nothing_of_a_budget_never_runs_out() -> None:
    watch = BudgetWatch()
    watch.take(host_pb2.SampleSet(at_unix_us=1))
    assert not watch.ran_out.is_set()

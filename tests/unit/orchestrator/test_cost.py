"""Costs of trials and of arms agree with values computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hintfleet.sketch import Sketch
from hintfleet.units import MIB
from orchestrator.results.comparison import ArmCost, CostRow, compare
from orchestrator.results.cost import COUNTERS, Cost, host_cost
from orchestrator.results.footprint import Series
from orchestrator.results.statistics import Interval
from orchestrator.trial.records import GuestSettled, LoopFigures, StepDone

S = 1_000_000


def series(*points: tuple[float, int], **grown: int) -> Series:
    """Return samples at `points`, each (second, resident MiB). Each counter grows by its value in
    `grown` per second, or stays 0."""
    at_us = np.array([round(at * S) for at, _ in points], dtype=np.int64)
    return Series(
        at_unix_us=at_us,
        resident_bytes=np.array([mib * MIB for _, mib in points], dtype=np.uint64),
        counters={name: (at_us * grown.get(name, 0) // S).astype(np.uint64) for name in COUNTERS},
    )


def step(kind: str, start: float, end: float, changed_mib: int = 0) -> StepDone:
    return StepDone(
        host="h",
        trial_id="t",
        guest="g",
        at_unix_us=round(end * S),
        kind=kind,
        changed_bytes=changed_mib * MIB,
        held_bytes=0,
        verified_pages=1,
        wrong_pages=0,
        duration_us=round((end - start) * S),
    )


STEPS = [step("allocate", 1, 2), step("free", 4, 4.5, changed_mib=100), step("verify", 9, 10)]


def settle_s(*points: tuple[float, int], steps: list[StepDone] = STEPS) -> tuple[float, ...]:
    return host_cost({"g": series(*points)}, {"g": steps}, []).settle_s


def test_the_time_until_nearly_all_that_came_back_was_back() -> None:
    # In the end 100 MiB came back to the host. 95 MiB of them were back 2 s after the free step.
    assert settle_s((0, 0), (3, 200), (5, 150), (6.5, 105), (8, 100), (10, 100)) == (2.0,)


def test_what_left_while_the_step_ran_took_no_time() -> None:
    assert settle_s((0, 0), (3, 200), (4.4, 100), (6, 100), (10, 100)) == (0.0,)


def test_nothing_came_back() -> None:
    assert settle_s((0, 0), (3, 200), (5, 198), (10, 199)) == ()
    assert settle_s((0, 0), (3, 200), (5, 210), (10, 220)) == ()


def test_a_free_step_is_over_when_the_next_step_begins() -> None:
    steps = [*STEPS[:2], step("free", 6, 6.5, changed_mib=50), step("verify", 9, 10)]
    points = ((0, 0), (3, 200), (5, 100), (5.9, 100), (7.5, 50), (10, 50))
    assert settle_s(*points, steps=steps) == (0.5, 1.0)


def test_counters_are_of_the_window_and_of_all_guests() -> None:
    points = tuple((at / 2, 100) for at in range(22))
    grown = {
        "agent_cpu_us": 1000,
        "process_cpu_us": 3000,
        "host_agent_cpu_us": 5000,
        "observing_cpu_us": 1000,
        "wire_bytes": 20,
        "ranges": 10,
        "tracker_bytes": 1,
    }
    settled = GuestSettled(
        host="h",
        trial_id="t",
        guest="a",
        at_unix_us=0,
        batches=1,
        hinted_bytes=1,
        duration_us=S // 4,
    )
    guests = {"a": series(*points, **grown), "b": series(*points, **grown)}
    cost = host_cost(guests, dict.fromkeys(guests, STEPS), [settled])
    assert cost.agent_cpu_s == pytest.approx(2 * 8 * 1e-3)
    assert cost.process_cpu_s == pytest.approx(2 * 8 * 3e-3)
    assert cost.host_agent_cpu_s == pytest.approx(8 * 4e-3), "there is one for all guests"
    assert cost.observing_cpu_s == pytest.approx(8 * 1e-3), "the cost of measuring is separate"
    assert (cost.wire_bytes, cost.ranges) == (320, 160)
    assert cost.tracker_bytes == 10
    assert cost.step_s == pytest.approx(2 * 1.5), "the read-back is no part of the workload"
    assert cost.asked_settle_s == (0.25,)


def test_an_agent_that_was_restarted_counts_from_0_again() -> None:
    """Its guest was not restarted, so in a switchback the block is not left out: what was used
    before and after the restart is added up."""
    found = series(*((at, 100) for at in range(11)))
    told_s = (700, 700, 701, 702, 702, 1, 2, 2, 3, 4, 5)
    counters = {**found.counters, "agent_cpu_us": np.array(told_s, dtype=np.uint64) * S}
    cost = host_cost({"g": replace(found, counters=counters)}, {"g": STEPS}, [])
    assert cost.agent_cpu_s == 2 + 4, "before the restart, and after it"


def test_a_replay_costs_what_it_works_and_not_what_it_waits() -> None:
    steps = [STEPS[0], replace(step("replay", 3, 8), waited_us=4 * S), STEPS[-1]]
    assert host_cost({"g": series((0, 0), (10, 0))}, {"g": steps}, []).step_s == pytest.approx(2)


def test_a_loop_lasts_as_long_as_it_should_and_is_no_slowdown() -> None:
    loop = LoopFigures(
        title="churn", cycles=1, touched_bytes=1, allocation_us=Sketch(), bytes_per_s=Sketch()
    )
    steps = [*STEPS[:2], replace(step("churn", 5, 8), loop=loop), STEPS[-1]]
    cost = host_cost({"g": series((0, 0), (10, 0))}, {"g": steps}, [])
    assert cost.step_s == pytest.approx(1.5)
    assert [(one.kind, one.loop_s) for one in cost.loops] == [("churn", 3.0)]


COST = Cost(
    settle_s=(),
    asked_settle_s=(),
    step_s=2.0,
    agent_cpu_s=0.0,
    process_cpu_s=1.0,
    host_agent_cpu_s=0.5,
    wire_bytes=0,
    ranges=0,
    tracker_bytes=0,
)
HINTED = Cost(
    settle_s=(0.1, 0.3),
    asked_settle_s=(),
    step_s=3.0,
    agent_cpu_s=0.2,
    process_cpu_s=1.5,
    host_agent_cpu_s=0.75,
    wire_bytes=21,
    ranges=10,
    tracker_bytes=416,
)


def rows(hinted: Cost | None = HINTED, control: Cost | None = COST) -> list[CostRow]:
    return [
        CostRow(arm=arm, is_control=arm == "none", repetition=i, host=host, cost=cost)
        for i in (0, 1)
        for host in ("a", "b")
        for arm, cost in (("none", control), ("hint", hinted))
    ]


def only(found: list[ArmCost]) -> ArmCost:
    (arm,) = found
    return arm


def test_an_arm_against_the_control() -> None:
    arm = only(compare(rows(), "embedded"))
    assert arm.settle_s == pytest.approx(0.2)
    assert arm.slowest_settle_s == 0.3
    assert arm.wire_bytes_per_range == 2.1
    assert arm.tracker_bytes == 416
    assert arm.slowdown_percent is not None
    assert arm.slowdown_percent.mean == pytest.approx(50)
    assert arm.slowdown_percent.pairs == 2
    assert arm.guest_cpu_s is not None
    assert arm.guest_cpu_s.mean == pytest.approx(2 * 0.5), "an embedded guest is its process"
    assert arm.host_cpu_s is not None
    assert arm.host_cpu_s.mean == pytest.approx(2 * 0.75)


def test_in_a_real_guest_the_agent_alone_counts() -> None:
    found = only(compare(rows(), "libvirt")).guest_cpu_s
    assert found is not None
    assert found.mean == pytest.approx(2 * 0.2)


def test_twice_as_slow_and_twice_as_fast_cancel_out() -> None:
    found = rows()
    for i, step_s in ((1, 1.0), (3, 1.0), (5, 4.0), (7, 4.0)):
        found[i] = replace(found[i], cost=replace(HINTED, step_s=step_s))
    slowdown = only(compare(found, "embedded")).slowdown_percent
    assert slowdown is not None
    assert slowdown.mean == pytest.approx(0)
    assert slowdown.low < 0 < slowdown.high


def test_hosts_of_one_trial_are_one_draw() -> None:
    """A difference between hosts that is the same in every trial must not widen the interval."""
    found = rows()
    for i, process_cpu_s in ((1, 1.0), (3, 2.0), (5, 1.0), (7, 2.0)):
        found[i] = replace(found[i], cost=replace(HINTED, process_cpu_s=process_cpu_s))
    guest_cpu_s = only(compare(found, "embedded")).guest_cpu_s
    assert guest_cpu_s == Interval(mean=1.0, low=1.0, high=1.0, pairs=2)
    one = only(compare([row for row in rows() if row.repetition == 0], "embedded"))
    assert (one.guest_cpu_s, one.host_cpu_s, one.slowdown_percent) == (None, None, None)


def test_undecided_trials_leave_no_figure() -> None:
    assert compare([*rows(), replace(rows()[1], repetition=2, cost=None)], "embedded") == []
    assert only(compare(rows(control=None), "embedded")).slowdown_percent is None

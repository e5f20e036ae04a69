"""Changes between two runs: what forms a pair, what a percentage is of, and when a change is
undecided or left out."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.sketch import Sketch, bucket_of
from hintfleet.units import MIB
from orchestrator.results.bounds import Verdict, judge, parse_bound
from orchestrator.results.capacity import Capacity, CapacityRow
from orchestrator.results.changes import Change, Figure, RunRows, Unit, compare_runs
from orchestrator.results.comparison import CostRow
from orchestrator.results.cost import Cost
from orchestrator.results.footprint import Footprint
from orchestrator.results.loops import LoopSum
from orchestrator.results.savings import FootprintRow
from orchestrator.results.statistics import Interval, mean_interval

HOSTS = ("a", "b")


def footprint(mib: float) -> Footprint:
    return Footprint(
        provisioned_bytes=0,
        peak_resident_bytes=0.0,
        mean_resident_bytes=mib * MIB,
        resident_gib_min=mib / 1000,
        reclaimed_now_bytes=0,
        refaulted_total_bytes=0,
        verified_pages=0,
        wrong_pages=0,
        returned=None,
    )


def cost(
    step_s: float = 1.0,
    cpu_s: float = 1.0,
    settle_s: tuple[float, ...] = (),
    loops: tuple[LoopSum, ...] = (),
) -> Cost:
    return Cost(
        settle_s=settle_s,
        asked_settle_s=(),
        step_s=step_s,
        agent_cpu_s=0.0,
        process_cpu_s=cpu_s,
        host_agent_cpu_s=0.5,
        wire_bytes=0,
        ranges=0,
        tracker_bytes=0,
        loops=loops,
    )


def loop(title: str, touched_mib: int, allocations_us: Sequence[float]) -> LoopSum:
    return LoopSum(
        title=title,
        kind="churn",
        guests=1,
        cycles=1,
        touched_bytes=touched_mib * MIB,
        loop_s=2.0,
        allocation_us=Sketch.of(Counter(map(bucket_of, allocations_us))),
        bytes_per_s=Sketch(),
    )


def run(
    name: str,
    resident_mib: Sequence[float],
    hinted: Cost = cost(step_s=1.2, cpu_s=1.5, settle_s=(0.1, 0.3)),  # noqa: B008 - frozen
) -> RunRows:
    """Return a run on two hosts: the control uses 100 MiB on each, arm `hint` uses `resident_mib`
    in repetition 0, 1 and so on."""
    footprints, costs = [], []
    for repetition, mib in enumerate(resident_mib):
        for host in HOSTS:
            for arm, found, spent in (("none", 100.0, cost()), ("hint", mib, hinted)):
                row = FootprintRow(
                    run_id=name,
                    experiment="e",
                    spec_hash="x",
                    arm=arm,
                    is_control=arm == "none",
                    repetition=repetition,
                    host=host,
                    guest="",
                    footprint=footprint(found),
                )
                footprints += [row, replace(row, guest="g", footprint=footprint(7))]
                costs.append(
                    CostRow(
                        arm=arm,
                        is_control=arm == "none",
                        repetition=repetition,
                        host=host,
                        cost=spent,
                    )
                )
    return RunRows(footprints=footprints, costs=costs)


def changed(first: RunRows, second: RunRows, arm: str = "hint") -> dict[Figure, Change]:
    return {change.figure: change for change in compare_runs(first, second) if change.arm == arm}


BEFORE = run("r1", [60, 62, 64])
SLOWER = cost(step_s=1.5, cpu_s=1.9, settle_s=(0.2, 0.6))


def test_a_repetition_of_the_whole_fleet_is_a_pair() -> None:
    saved = changed(BEFORE, run("r2", [61, 64, 67]))[Figure.SAVED]
    # 2 hosts: 80, 76, 72 MiB were saved before, and then 78, 72, 66.
    assert saved.pairs == ((80 * MIB, 78 * MIB), (76 * MIB, 72 * MIB), (72 * MIB, 66 * MIB))
    assert (saved.first, saved.second) == (76 * MIB, 72 * MIB)
    assert saved.difference == mean_interval([-2.0 * MIB, -4.0 * MIB, -6.0 * MIB])
    assert saved.percent is not None
    assert saved.percent.mean == pytest.approx(100 * -4 / 76)


def test_all_loops_of_a_trial_are_one_figure() -> None:
    calm = cost(loops=(loop("a", 100, [1000] * 99), loop("b", 60, [1000, 9000, 9000])))
    slow = cost(loops=(loop("a", 40, [4000] * 99), loop("b", 40, [9000])))
    found = changed(run("r1", [60, 61], calm), run("r2", [60, 61], slow))
    rate = found[Figure.LOOP_RATE]
    assert (rate.first, rate.second) == (40 * MIB, 20 * MIB)
    p99 = found[Figure.ALLOCATION_P99]
    assert p99.first == pytest.approx(9.0, rel=0.01)
    assert p99.second == pytest.approx(4.0, rel=0.01)
    assert Figure.SETTLE not in found, "nothing was freed"
    assert Figure.LOOP_RATE not in changed(run("r1", [60, 61], calm), BEFORE, "none")


def exactly(value: float) -> Any:
    """Return an interval of three pairs without spread, to compare with."""
    near: Any = pytest.approx(value)
    return Interval(mean=near, low=near, high=near, pairs=3)


def test_each_figure_has_its_unit_and_says_what_a_percentage_is_of() -> None:
    found = changed(BEFORE, run("r2", [60, 62, 64], SLOWER))
    assert [(figure, change.figure.unit) for figure, change in found.items()] == [
        (Figure.SAVED, Unit.BYTES),
        (Figure.RESIDENT, Unit.BYTES),
        (Figure.GIB_MIN, Unit.GIB_MIN),
        (Figure.SLOWDOWN, Unit.PERCENT),
        (Figure.HOST_CPU, Unit.SECONDS),
        (Figure.SETTLE, Unit.SECONDS),
    ]
    means = {figure: (change.first, change.second) for figure, change in found.items()}
    assert means[Figure.GIB_MIN] == pytest.approx((0.124, 0.124))
    assert means[Figure.SLOWDOWN] == pytest.approx((20, 50))
    assert means[Figure.HOST_CPU] == pytest.approx((2 * 0.5, 2 * 0.9))
    assert means[Figure.SETTLE] == pytest.approx((0.2, 0.4))
    percent = {figure: change.percent for figure, change in found.items()}
    assert percent[Figure.SLOWDOWN] == exactly(25), "1.5 / 1.2: of the steps' time"
    assert found[Figure.SLOWDOWN].difference is None
    assert percent[Figure.HOST_CPU] == exactly(80)
    assert all("in the first run" in change.figure.percent_of for change in found.values())


def test_the_control_has_only_its_memory() -> None:
    assert list(changed(BEFORE, BEFORE, "none")) == [Figure.RESIDENT, Figure.GIB_MIN]
    alone = replace(BEFORE, footprints=[row for row in BEFORE.footprints if not row.is_control])
    assert list(changed(alone, alone)) == [Figure.RESIDENT, Figure.GIB_MIN, Figure.SETTLE]


def test_only_repetitions_that_both_runs_have_are_pairs() -> None:
    assert len(changed(BEFORE, run("r2", [60, 62]))[Figure.SAVED].pairs) == 2
    one = run("r2", [60])
    for figure, change in changed(BEFORE, one).items():
        assert change.undecided, figure
        assert (change.first, change.second, change.difference, change.percent) == (None,) * 4
    (resident, _) = changed(BEFORE, one, "none").values()
    assert "2 repetitions that both runs have" in resident.undecided


def test_a_run_with_a_precision_has_no_interval_before_its_first_look() -> None:
    first = run("r1", [60, 62])
    looked = replace(first, footprints=[replace(row, first_look=3) for row in first.footprints])
    change = changed(looked, looked, "none")[Figure.RESIDENT]
    assert "3 repetitions that both runs have" in change.undecided
    verdict = judge(parse_bound("resident > 1MiB"), [change])[0]
    assert (verdict.verdict, verdict.reason) == (Verdict.UNDECIDED, change.undecided)


def test_an_undecided_arm_has_no_changes() -> None:
    spoilt = replace(BEFORE.footprints[2], footprint=None, undecided="guest lost")
    lost = replace(BEFORE, footprints=[*BEFORE.footprints, replace(spoilt, repetition=3)])
    for pair, which in (((lost, BEFORE), "first"), ((BEFORE, lost), "second")):
        found = changed(*pair)
        assert len(found) == 6
        for change in found.values():
            assert change.undecided == f"{which} run: hint, repetition 4, guest lost"
        assert not any(c.undecided for c in changed(*pair, "none").values())


def test_an_arm_without_a_trial_in_one_run() -> None:
    fewer = replace(BEFORE, footprints=[row for row in BEFORE.footprints if row.is_control])
    for change in changed(BEFORE, fewer).values():
        assert change.undecided == "second run: no trial of this arm has ended"


def test_settle_times_are_not_compared_if_memory_did_not_always_come_back() -> None:
    never = cost(step_s=1.2, cpu_s=1.5)
    costs = [
        replace(row, cost=never) if (row.arm, row.repetition) == ("hint", 1) else row
        for row in BEFORE.costs
    ]
    found = changed(BEFORE, replace(BEFORE, costs=costs))
    assert found[Figure.SETTLE].undecided == (
        "second run: 2 of 3 repetitions have the figure settle"
    )
    assert not found[Figure.HOST_CPU].undecided


def filled(*guests: int, ran_out: bool = True) -> RunRows:
    """Return a run on one host that so many guests fitted on, in repetition 0, 1 and so on."""
    rows = [
        CapacityRow(
            arm="hint",
            is_control=False,
            repetition=repetition,
            host="a",
            capacity=Capacity(guests=count, ran_out=ran_out),
        )
        for repetition, count in enumerate(guests)
    ]
    return RunRows(footprints=(), costs=(), capacities=rows)


def test_guests_that_fit_are_compared_if_the_hosts_were_full() -> None:
    (found,) = compare_runs(filled(5, 6), filled(6, 8))
    assert (found.figure, found.pairs) == (Figure.GUESTS, ((5, 6), (6, 8)))
    (found,) = compare_runs(filled(5, 6), filled(6, 6, ran_out=False))
    assert found.undecided == (
        "second run: hint, a host took all guests of the spec, and more might fit"
    )


def change(pairs: Sequence[tuple[float, float]], figure: Figure = Figure.SAVED) -> Change:
    return Change(arm="hint", figure=figure, pairs=tuple(pairs))


values = st.integers(-1000, 1000).map(lambda tenths: tenths / 10)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=8), st.floats(-300, 300))
def test_a_percentage_is_in_the_interval_if_the_data_do_not_exclude_it(
    pairs: list[tuple[float, float]], percent: float
) -> None:
    """The definition of Fieller's interval."""
    found = change(pairs)
    first = mean_interval([before for before, _ in pairs])
    rest = mean_interval(found.excess(factor=1 + percent / 100))
    assert first is not None
    assert rest is not None
    if found.percent is None:
        assert first.low <= 1e-6
        return
    near_the_end = min(abs(rest.low), abs(rest.high)) < 1e-6
    inside = found.percent.low <= percent <= found.percent.high
    assert near_the_end or inside is (rest.low <= 0 <= rest.high)


def test_a_percentage_holds_the_truth_as_often_as_it_says() -> None:
    """The first run's figure is noisy, too: here it has most of the noise."""
    chance = random.Random(1)
    covered = 0
    for _ in range(2000):
        pairs = [(chance.gauss(100, 25), chance.gauss(60, 5)) for _ in range(10)]
        found = change(pairs).percent
        assert found is not None
        covered += found.low <= -40 <= found.high
    assert 0.94 <= covered / 2000 <= 0.96

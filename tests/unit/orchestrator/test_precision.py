"""Runs with a precision go on until the intervals of all arms that can still be decided are narrow
enough, or max_repetitions are done. A run that was cut off goes on as if it had not been."""

import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import ExitCode
from hintfleet.units import MIB
from orchestrator.commands.show_run import exit_code, run_as_data
from orchestrator.experiment import Experiment, run_rounds, stored_experiment
from orchestrator.results.comparison import compare
from orchestrator.results.footprint import Footprint
from orchestrator.results.precision import Precision, look, reached
from orchestrator.results.savings import By, FootprintRow, aggregate
from orchestrator.results.statistics import mean_interval
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.results.trial_outcome import TrialFigures, TrialOutcome, TrialStatus
from orchestrator.service.queries import ask_store
from orchestrator.spec import file as spec_file
from orchestrator.trial.plan import Trial, plan_trials, rounds
from orchestrator.view.precision import look_line, outcome
from tests.unit.orchestrator import test_tables
from tests.unit.orchestrator.test_cost import COST

FIVE_PERCENT = Precision(percent=5.0, size_bytes=None, least_repetitions=3, most_repetitions=10)
RUN = replace(test_tables.RUN, state="done", precision=FIVE_PERCENT)
USED_MIB = 1000.0
NARROW, WIDE = (300.0, 301.0, 302.0, 300.0), (200.0, 300.0, 400.0, 250.0)
"""MiB saved in each repetition: with 5 % of 1000 MiB wanted, narrow enough and too wide."""


def footprint(mean_mib: float) -> Footprint:
    return Footprint(
        provisioned_bytes=2000 * MIB,
        peak_resident_bytes=2000.0 * MIB,
        mean_resident_bytes=mean_mib * MIB,
        resident_gib_min=mean_mib,
        reclaimed_now_bytes=0,
        refaulted_total_bytes=0,
        verified_pages=1,
        wrong_pages=0,
        returned=None,
    )


def trial(arm: str, repetition: int, mean_mib: float | None, **changes: bool | str) -> FootprintRow:
    row = FootprintRow(
        run_id="r",
        experiment="e",
        spec_hash="x",
        arm=arm,
        is_control=arm == "none",
        repetition=repetition,
        host="h",
        guest="",
        footprint=None if mean_mib is None else footprint(mean_mib),
        first_look=3,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def rows(**saved: Sequence[float]) -> list[FootprintRow]:
    """Return the trials of a control, and of arms that save these MiB in each repetition."""
    repetitions = len(next(iter(saved.values())))
    control = [trial("none", i, USED_MIB) for i in range(repetitions)]
    treated = (
        trial(arm, i, USED_MIB - s) for arm, all_ in saved.items() for i, s in enumerate(all_)
    )
    return [*control, *treated]


def spoilt(
    found: Iterable[FootprintRow], arm: str, repetition: int, *, lost: bool
) -> list[FootprintRow]:
    """Return the trials, without the figures of the one of this arm and repetition."""
    return [
        replace(row, footprint=None, undecided="host gone", lost=lost)
        if (row.arm, row.repetition) == (arm, repetition)
        else row
        for row in found
    ]


def test_a_run_waits_for_each_arm() -> None:
    assert look(rows(a=NARROW, b=NARROW), FIVE_PERCENT).is_enough
    seen = look(rows(a=NARROW, b=WIDE), FIVE_PERCENT)
    assert not seen.is_enough
    assert seen.repetitions == 4
    enough = {arm: found is not None and found.is_enough for arm, found in seen.arms.items()}
    assert enough == {"a": True, "b": False}


@pytest.mark.parametrize(("size_mib", "enough"), [(400, True), (100, False)])
def test_a_size_may_be_wanted(size_mib: int, enough: bool) -> None:
    wanted = replace(FIVE_PERCENT, percent=None, size_bytes=size_mib * MIB)
    assert look(rows(a=WIDE), wanted).is_enough == enough


def test_before_the_first_look_nothing_is_enough() -> None:
    assert not look(rows(a=NARROW[:2]), FIVE_PERCENT).is_enough


def test_a_percentage_is_of_what_the_control_uses_in_the_pairs() -> None:
    (arm,) = [row for row in aggregate(rows(a=WIDE), By.FLEET) if row.arm == "a"]
    assert arm.control_bytes == pytest.approx(USED_MIB * MIB)
    found = reached(arm, FIVE_PERCENT)
    assert found is not None
    assert found.wanted_bytes == pytest.approx(50 * MIB)
    assert arm.saved_bytes is not None
    assert found.half_width_bytes == arm.saved_bytes.half_width
    assert found.more_repetitions == 39, "for the spread of WIDE, 85 MiB"


@given(
    st.lists(st.floats(0, 600), min_size=3, max_size=9),
    st.sets(st.tuples(st.sampled_from(["none", "a"]), st.integers(0, 8))),
)
def test_a_lost_trial_only_takes_its_pair_away(
    saved: list[float], lost: set[tuple[str, int]]
) -> None:
    found = rows(a=saved)
    for arm, repetition in lost:
        found = spoilt(found, arm, repetition, lost=True)
    gone = {repetition for _, repetition in lost}
    left = [s for i, s in enumerate(saved) if i not in gone]
    interval = mean_interval(left, 3)
    seen = look(found, FIVE_PERCENT).arms["a"]
    assert (seen is None) == (interval is None)
    if seen and interval:
        assert seen.half_width_bytes == pytest.approx(interval.half_width * MIB, abs=1.0)


def test_an_undecided_arm_is_not_waited_for() -> None:
    found = spoilt(rows(a=WIDE, b=NARROW), "a", 1, lost=False)
    assert look(found, FIVE_PERCENT).is_enough
    found = spoilt(rows(a=WIDE, b=NARROW), "b", 1, lost=False)
    assert not look(found, FIVE_PERCENT).is_enough


def test_a_run_whose_control_is_undecided_has_nothing_to_wait_for() -> None:
    seen = look(spoilt(rows(a=WIDE, b=WIDE), "none", 0, lost=False), FIVE_PERCENT)
    assert seen.is_enough
    assert look_line(seen) == "after 4 repetitions: no arm can be decided any more"


def test_a_trial_that_was_cut_off_is_waited_for() -> None:
    found = [*rows(a=NARROW), trial("none", 4, USED_MIB), trial("a", 4, None)]
    assert not look(found, FIVE_PERCENT).is_enough


@pytest.mark.parametrize("by", list(By))
def test_no_interval_of_such_a_run_is_plain(by: By) -> None:
    guests = [replace(row, guest="g") for row in rows(a=WIDE)]
    for row in aggregate([*rows(a=WIDE), *guests], by):
        for interval in (row.saved_bytes, row.saved_gib_min):
            assert interval is None or interval.first_look == 3
        if row.saved_bytes:
            saved = [value * MIB for value in WIDE]
            assert row.saved_bytes.half_width == pytest.approx(mean_interval(saved, 3).half_width)  # type: ignore[union-attr]


def test_what_is_said() -> None:
    seen = look(rows(a=NARROW, b=WIDE), FIVE_PERCENT)
    assert look_line(seen) == (
        "after 4 repetitions: b ±263 MiB, ±50 MiB wanted, about 39 more at this spread"
    )
    assert look_line(look(rows(a=NARROW), FIVE_PERCENT)) == (
        "after 4 repetitions: all intervals are narrow enough"
    )
    found = aggregate(spoilt(rows(a=NARROW, b=NARROW), "b", 1, lost=True), By.FLEET)
    assert outcome(RUN, found) == (
        "precision ±5 % of what the control uses, after 4 repetitions: not reached: b is undecided"
    )
    size = replace(FIVE_PERCENT, percent=None, size_bytes=64 * MIB)
    of_size = replace(RUN, precision=size)
    assert outcome(of_size, aggregate(rows(a=NARROW), By.FLEET)) == (
        "precision ±64 MiB, after 4 repetitions: reached"
    )
    control = aggregate([trial("none", 0, USED_MIB)], By.FLEET)
    for nothing in ([], control):
        assert outcome(of_size, nothing).endswith("not reached: there is no pair of trials")
    assert outcome(replace(RUN, state="running"), control) == ""
    assert outcome(replace(RUN, precision=None), found) == ""
    tiny = replace(size, size_bytes=4096)
    assert "more than 10000 repetitions" in look_line(look(rows(a=WIDE), tiny))


SPEC = """\
name: mine
driver: embedded
hosts: {count: 1, memory: 1GiB}
guests: {per_host: 1, memory: 256MiB}
workload: {phases: [{allocate: 96MiB}]}
arms:
  - {name: none, method: none}
  - {name: a, method: hinting}
  - {name: b, method: hinting}
repetitions: 3
precision: 5%
max_repetitions: 8
"""
LOADED = spec_file.parse(SPEC, "mine.yaml")
PLAN = plan_trials(LOADED.spec, "run1")
NEW = Experiment(
    loaded=LOADED,
    header=RunHeader(run_id="run1", spec=LOADED.spec, spec_text=SPEC, summary=""),
    trials=PLAN,
    to_run=PLAN,
)
MEDIUM = 20.0


def saved_mib(of: Trial, spread_mib: float) -> float:
    """Return how much this trial saves: 0 under the control, else 300 MiB and noise of this
    spread, which is the same in each call for one arm and repetition."""
    if of.arm.name == "none":
        return 0.0
    return 300 + random.Random(f"{of.arm.name}{of.repetition}").gauss(0, spread_mib)


def store(writer: RunWriter, of: Trial, spread_mib: float, status: TrialStatus) -> None:
    done = status is TrialStatus.DONE
    figures = TrialFigures(
        host="host1",
        guest="",
        footprint=footprint(USED_MIB - saved_mib(of, spread_mib)) if done else None,
        cost=COST if done else None,
        undecided="" if done else "host gone",
    )
    writer.begin_trial(of)
    reason = "" if done else "host gone"
    writer.end_trial(TrialOutcome(status=status, reason=reason, figures=(figures,)))


class CutOff(Exception):
    """A run was cut off."""


def run_on(
    folder: Path,
    spread_mib: float,
    cut_after: int = 100,
    lost: Sequence[str] = (),
    retries: int = 0,
) -> list[str]:
    """Run what is left of a run, or a new run; made up figures are stored, no guests run.

    :param cut_after: how many trials run before the run is cut off.
    :param lost: the ids of the trials that are lost.
    :returns: the ids of the trials that ran.
    """
    ran: list[str] = []
    with Store(folder) as found:
        is_new = not found.has_run("run1")
        experiment = NEW if is_new else stored_experiment(found, found.find_run("run1"))

        def run_trial(of: Trial) -> TrialStatus:
            if len(ran) == cut_after:
                raise CutOff
            status = TrialStatus.LOST if of.trial_id in lost else TrialStatus.DONE
            store(writer, of, spread_mib, status)
            ran.append(of.trial_id)
            return status

        def is_enough() -> bool:
            precision = found.find_run("run1").precision
            assert precision is not None
            return look(found.footprint_rows("run1", even_running=True), precision).is_enough

        with suppress(CutOff), RunWriter(found, experiment.header, not is_new) as writer:
            if experiment.to_run:
                left = rounds(experiment.header.spec, experiment.to_run, experiment.begun)
                run_rounds(left, retries, run_trial, is_enough)
    return ran


@pytest.mark.parametrize(
    ("spread_mib", "cuts"), [(1.0, (8, 9)), (MEDIUM, range(8, 22)), (200.0, (23, 24))]
)
def test_a_run_that_is_cut_off_anywhere_ends_as_if_it_had_not_been(
    tmp_path: Path, spread_mib: float, cuts: Sequence[int]
) -> None:
    whole = run_on(tmp_path / "whole", spread_mib)
    for cut_after in cuts:
        folder = tmp_path / str(cut_after)
        before = run_on(folder, spread_mib, cut_after)
        assert before + run_on(folder, spread_mib) == whole
        with Store(folder) as found:
            run = found.find_run("run1")
            assert run.state == "done"
            assert stored_experiment(found, run).is_over


@pytest.mark.parametrize(("spread_mib", "repetitions"), [(1.0, 3), (MEDIUM, 7), (200.0, 8)])
def test_how_long_runs_get(tmp_path: Path, spread_mib: float, repetitions: int) -> None:
    assert len(run_on(tmp_path, spread_mib)) == 3 * repetitions, "at least 3, at most 8"


def test_a_lost_trial_is_run_again_before_the_run_goes_on(tmp_path: Path) -> None:
    first = run_on(tmp_path, 1.0, lost=("run1-a-1",))
    assert len(first) == 4 * 3, "one repetition more, for the pair that was lost"
    assert run_on(tmp_path, 1.0) == ["run1-a-1.2"]
    with Store(tmp_path) as found:
        assert found.find_run("run1").state == "done"
        assert [row.trials for row in ask_store(found, By.FLEET, "run1")] == [4, 4, 4]


def test_a_retry_comes_before_the_look(tmp_path: Path) -> None:
    ran = run_on(tmp_path, 1.0, lost=("run1-a-1", "run1-none-2"), retries=1)
    assert len(ran) == 3 * 3 + 2
    assert ran[-2:] == ["run1-a-1.2", "run1-none-2.2"]


@pytest.mark.parametrize(("spread_mib", "enough"), [(1.0, True), (200.0, False)])
def test_a_stored_run_says_whether_it_is_precise(
    tmp_path: Path, spread_mib: float, enough: bool
) -> None:
    run_on(tmp_path, spread_mib)
    with Store(tmp_path) as found:
        run = found.find_run("run1")
        arms = aggregate(found.footprint_rows("run1"), By.FLEET)
        data = run_as_data(found, run, arms)
        assert data["precision"]["percent"] == 5
        assert [arm["precision"] and arm["precision"]["is_enough"] for arm in data["arms"]] == [
            None, enough, enough,
        ]  # fmt: skip
        assert exit_code(run, arms) is ExitCode.DONE, "wide intervals hold, too"
        for cost in compare(found.cost_rows("run1"), run.driver):
            assert cost.slowdown_percent is not None
            assert cost.slowdown_percent.first_look == 3
            assert cost.host_cpu_s is not None
            assert cost.host_cpu_s.first_look == 3

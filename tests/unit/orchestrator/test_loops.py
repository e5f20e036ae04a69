"""What loops measured in a trial: sums, and percentiles of all values of its guests and hosts
together; then means over trials, and pairs of trials. The store keeps and the tables show it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hintfleet.sketch import Sketch, bucket_of
from hintfleet.units import GIB, MIB
from orchestrator.results.comparison import CostRow
from orchestrator.results.cost import Cost
from orchestrator.results.loop_comparison import ArmLoops, LoopFigure, compare_loops
from orchestrator.results.loops import LoopSum, loops_of
from orchestrator.results.statistics import Interval
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.results.trial_outcome import TrialFigures, TrialOutcome, TrialStatus
from orchestrator.trial.plan import plan_trials
from orchestrator.trial.records import LoopFigures, StepDone
from orchestrator.view.loop_tables import loop_tables
from tests.support.stored import QUICKSTART
from tests.unit.orchestrator.test_cost import COST
from tests.unit.orchestrator.test_tables import rendered


def sketch(*values: float) -> Sketch:
    return Sketch.of(Counter(map(bucket_of, values)))


def churned(guest: str, cycles: int, *allocation_us: float, kind: str = "churn") -> StepDone:
    return StepDone(
        host="h",
        trial_id="t",
        guest=guest,
        at_unix_us=9_000_000,
        kind=kind,
        changed_bytes=0,
        held_bytes=0,
        verified_pages=0,
        wrong_pages=0,
        duration_us=2_000_000,
        loop=LoopFigures(
            title=f"{kind} 1 MiB",
            cycles=cycles,
            touched_bytes=cycles * MIB,
            allocation_us=sketch(*allocation_us),
            bytes_per_s=sketch(),
        ),
    )


def test_loops_of_one_title_are_one_sum() -> None:
    steps = {
        "a": [churned("a", 10, 100, 100), churned("a", 20, 100), churned("a", 7, kind="fault")],
        "b": [churned("b", 30, 5000), replace(churned("b", 9), kind="free", loop=None)],
    }
    churn, fault = loops_of(steps)
    assert churn == LoopSum(
        title="churn 1 MiB",
        kind="churn",
        guests=2,
        cycles=60,
        touched_bytes=60 * MIB,
        loop_s=6.0,
        allocation_us=sketch(100, 100, 100, 5000),
        bytes_per_s=sketch(),
    )
    assert (fault.kind, fault.guests, fault.cycles) == ("fault", 1, 7)


def row(arm: str, repetition: int, host: str, cycles: int, *allocation_us: float) -> CostRow:
    loops = loops_of({"g": [churned("g", cycles, *allocation_us)]})
    return CostRow(
        arm=arm,
        is_control=arm == "none",
        repetition=repetition,
        host=host,
        cost=replace(COST, loops=loops),
    )


ROWS = [
    row("none", 0, "a", 40, *[100] * 99, 1000),
    row("none", 0, "b", 40, *[100] * 100),
    row("none", 1, "a", 40, *[100] * 99, 1000),
    row("none", 1, "b", 40, *[100] * 100),
    row("hint", 0, "a", 30, *[200] * 97, *[4000] * 3),
    row("hint", 0, "b", 10, *[200] * 100),
    row("hint", 1, "a", 10, *[200] * 97, *[4000] * 3),
    row("hint", 1, "b", 30, *[200] * 100),
]


def figure(found: LoopFigure | None) -> LoopFigure:
    assert found is not None
    return found


def more(found: LoopFigure | None) -> Interval:
    interval = figure(found).more_percent
    assert interval is not None
    return interval


def test_an_arm_against_the_control() -> None:
    none, hint = compare_loops(ROWS)
    assert (none.arm, hint.arm, hint.title) == ("none", "hint", "churn 1 MiB")
    assert figure(none.cycles) == LoopFigure(mean=40.0, more_percent=None)
    assert figure(hint.cycles).mean == 20.0, "in one guest"
    assert more(hint.cycles).mean == pytest.approx(-50)
    assert more(hint.cycles).pairs == 2, "a trial is one pair, whatever the hosts"
    assert figure(hint.allocation_p50_us).mean == pytest.approx(200, rel=0.01)
    assert figure(none.allocation_p99_us).mean == pytest.approx(100, rel=0.01)
    assert figure(hint.allocation_p99_us).mean == pytest.approx(4000, rel=0.01), "of both hosts"
    assert figure(hint.bytes_per_s).mean == 10 * MIB
    assert hint.bytes_per_s_p1 is None, "these guests sent no rates"


def test_an_arm_with_a_trial_that_does_not_count_has_no_figures() -> None:
    undecided = [*ROWS[:-1], replace(ROWS[-1], undecided="pages came back wrong")]
    assert [one.arm for one in compare_loops(undecided)] == ["none"]
    (hint,) = compare_loops([replace(ROWS[0], cost=None), *ROWS[1:]])
    assert figure(hint.cycles) == LoopFigure(mean=20.0, more_percent=None)


def test_a_workload_without_loops() -> None:
    assert compare_loops([replace(one, cost=COST) for one in ROWS]) == []


def test_the_store_keeps_what_loops_measured(tmp_path: Path) -> None:
    cost: Cost | None = ROWS[4].cost
    step = churned("host1-guest1", 3, 17, 4000)
    header = RunHeader(run_id="run1", spec=QUICKSTART, spec_text="", summary="")
    with Store(tmp_path) as store:
        with RunWriter(store, header) as writer:
            trial = plan_trials(QUICKSTART, "run1")[0]
            writer.begin_trial(trial)
            stored = replace(step, trial_id=trial.trial_id)
            writer.append([stored])
            figures = TrialFigures(host="host1", guest="", cost=cost)
            writer.end_trial(TrialOutcome(status=TrialStatus.DONE, figures=(figures,)))
        assert [one.cost for one in store.cost_rows("run1")] == [cost]
        assert store.events("run1", StepDone) == [stored]


@pytest.mark.parametrize("kind", ["churn", "fault", "bandwidth"])
def test_a_table_shows_every_figure_at_80_columns(kind: str) -> None:
    interval = Interval(mean=-12.3, low=-1234.5, high=1234.5, pairs=6)
    arm = ArmLoops(
        arm="an-arm-whose-name-is-as-long-as-names-get",
        title=f"{kind} 1 MiB",
        kind=kind,
        cycles=LoopFigure(mean=12345.6, more_percent=interval),
        allocation_p50_us=LoopFigure(mean=345.6, more_percent=interval),
        allocation_p99_us=LoopFigure(mean=45678.9, more_percent=interval),
        bytes_per_s=LoopFigure(mean=7.5 * GIB, more_percent=interval),
        bytes_per_s_p1=LoopFigure(mean=0.25 * GIB, more_percent=None),
    )
    (table,) = loop_tables([arm, replace(arm, arm="none", cycles=None)])
    shown = rendered(table, 80)
    wanted = {
        "churn": ("12,346", "0.346 ms", "45.7 ms", "-12 %", "[-1234, 1234]"),
        "fault": ("1,966,080/s", "65,536/s", "45.7 ms"),
        "bandwidth": ("7.50 GiB/s", "0.250 GiB/s"),
    }
    for text in wanted[kind]:
        assert text in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80

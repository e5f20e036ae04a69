"""How often hosts ran out of memory with each number of guests, and what is said about it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hintfleet.units import MIB
from orchestrator.cli import run_command
from orchestrator.experiment import store_records
from orchestrator.results.capacity import Capacity, CapacityRow
from orchestrator.results.frontier import Point, frontier
from orchestrator.results.statistics import share_interval
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.spec import catalogue
from orchestrator.spec import file as spec_file
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import HostTask, host_tasks, plan_trials
from orchestrator.trial.records import Event, GuestFits, HostDone, HostRanOut
from orchestrator.view.answer import frontier_answer
from tests.support.stored import NODE, charts_of

TEXT = catalogue.text("frontier")


def spec() -> Spec:
    return spec_file.parse(TEXT, "frontier").spec


def ran_out(arm: str, *hosts: bool, **changed: Any) -> list[CapacityRow]:
    return [
        CapacityRow(
            arm=arm,
            is_control=False,
            repetition=0,
            host=f"host{i}",
            capacity=Capacity(guests=0 if out else 3, ran_out=out, enforced=True if out else None),
            **changed,
        )
        for i, out in enumerate(hosts)
    ]


def test_each_host_of_each_trial_counts_and_the_memory_is_that_of_the_spec() -> None:
    rows = ran_out("none-3", False, False) + ran_out("none-5", True, False, True)
    three, five, *_ = frontier(rows, spec())
    assert (three.arm, three.guests, three.hosts, three.ran_out) == ("none", 3, 2, 0)
    assert three.overcommit == 1.0
    assert (five.guests, five.hosts, five.ran_out) == (5, 3, 2)
    assert five.overcommit == pytest.approx(5 / 3)
    assert (five.low, five.high) == share_interval(2, 3)


def test_a_bad_trial_leaves_no_figure() -> None:
    rows = ran_out("none-3", False, False) + ran_out("none-3", False, undecided="it was lost")
    point, *_ = frontier(rows, spec())
    assert (point.hosts, point.low, point.high) == (0, 0.0, 1.0)
    assert point.undecided == "none-3, repetition 1, it was lost"


def test_what_has_not_run_is_undecided() -> None:
    (three, *others) = frontier(ran_out("none-3", False), spec())
    assert (three.arm, three.guests, three.undecided) == ("none", 3, "")
    assert {point.undecided for point in others if point.arm == "none"} == {
        f"none-{n} has not run" for n in (5, 7, 9, 12)
    }
    assert frontier([], spec()) == []


def test_a_fixed_number_of_guests_has_no_frontier() -> None:
    assert frontier(ran_out("none", True), spec_file.load("density").spec) == []


@pytest.mark.parametrize("of", [1, 6, 20, 50])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.35, 0.5, 0.9])
def test_the_interval_has_the_true_share_in_at_least_95_percent(of: int, share: float) -> None:
    covered = 0.0
    for count in range(of + 1):
        low, high = share_interval(count, of)
        assert 0 <= low <= count / of <= high <= 1
        if low <= share <= high:
            covered += math.comb(of, count) * share**count * (1 - share) ** (of - count)
    assert covered >= 0.95


def points(**ran_out_with: tuple[int, ...]) -> list[Point]:
    return [
        Point(arm=arm, guests=3 + i, overcommit=1 + i / 4, hosts=4, ran_out=out)
        for arm, outs in ran_out_with.items()
        for i, out in enumerate(outs)
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            points(none=(0, 4, 4), eager=(0, 0, 1)),
            "eager runs 4 guests on a host (1.2 times its memory), and none of 4 hosts ran out of "
            "memory; none runs 3",
        ),
        (
            points(none=(2, 4), eager=(0, 0)),
            "eager runs 4 guests on a host (1.2 times its memory), and none of 4 hosts ran out of "
            "memory; under none some did with 3 already",
        ),
        # With 5 guests under eager no host ran out, but with 4 one did: so 5 fitted by chance.
        (
            points(none=(0, 0, 4), eager=(0, 1, 0)),
            "none runs 4 guests on a host (1.2 times its memory), and none of 4 hosts ran out of "
            "memory; no arm runs more",
        ),
        (points(none=(1, 2), eager=(1, 0)), ""),
        # Arm eager is undecided: whether it runs more guests is not known.
        (
            [*points(none=(0, 4)), replace(points(eager=(0,))[0], hosts=0, undecided="lost")],
            "none runs 3 guests on a host (1 times its memory), and none of 4 hosts ran out of "
            "memory",
        ),
        # With 4 guests under none nothing is known: it might run them, too.
        (
            [
                *points(none=(0,), eager=(0, 0, 0)),
                *(replace(one, hosts=0, undecided="lost") for one in points(none=(0, 0))[1:]),
            ],
            "eager runs 5 guests on a host (1.5 times its memory), and none of 4 hosts ran out of "
            "memory",
        ),
    ],
)
def test_the_answer(found: list[Point], said: str) -> None:
    assert frontier_answer(found) == said


def _events(task: HostTask) -> list[Event]:
    common: dict[str, Any] = {
        "host": task.host,
        "trial_id": task.trial.trial_id,
        "at_unix_us": 1_000_000,
    }
    events: list[Event] = []
    if len(task.guests) > (3 if task.trial.arm.name.startswith("none") else 9):
        events = [HostRanOut(**common, used_bytes=800 * MIB, limit_bytes=768 * MIB, enforced=True)]
    else:
        events = [GuestFits(**common, guest=one.name, used_bytes=MIB) for one in task.guests]
    return [*events, HostDone(**common)]


def test_a_stored_run_shows_its_frontier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id in ("run1", "run2"):
        header = RunHeader(run_id=run_id, spec=spec(), spec_text=TEXT, summary="a test")
        with Store(tmp_path) as store, RunWriter(store, header) as writer:
            for trial in plan_trials(spec(), run_id):
                tasks = host_tasks(spec(), trial)
                writer.begin_trial(trial, dict.fromkeys(tasks, NODE))
                store_records(writer, tasks, [_events(task) for task in tasks.values()])
    assert run_command(["show", "run1", "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "adaptive runs 9 guests on a host (3 times its memory)" in shown
    assert "6 of 6" in shown
    assert run_command(["show", "run1", "-o", "json", "--data-dir", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = shown["frontier"]
    assert [p["ran_out"] for p in found if p["arm"] == "none"] == [0, 6, 6, 6, 6]
    assert not shown["capacities"], "no guests were started one by one"
    path = tmp_path / "report.html"
    assert run_command(["report", "run1", "-o", str(path), "--data-dir", str(tmp_path)]) == 0
    page = path.read_text()
    assert "How often hosts ran out of memory" in page
    assert charts_of(page).keys() == {"frontier"}
    assert run_command(["compare", "run1", "run2", "--data-dir", str(tmp_path)]) == 2
    assert "such runs are not compared" in capsys.readouterr().err


def test_a_run_that_was_cut_off_in_its_first_trial_has_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = RunHeader(run_id="run1", spec=spec(), spec_text=TEXT, summary="a test")
    with Store(tmp_path) as store, RunWriter(store, header) as writer:
        trial = plan_trials(spec(), "run1")[0]
        writer.begin_trial(trial, dict.fromkeys(host_tasks(spec(), trial), NODE))
    run_command(["show", "run1", "--data-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "no trial has a figure" in shown
    assert "saved" not in shown

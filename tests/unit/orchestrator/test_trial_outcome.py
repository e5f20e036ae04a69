"""The outcome of a trial: after which faults it is lost or undecided, and when it is run again.
Also the outcome of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import MIB
from orchestrator.results.cost import COUNTERS
from orchestrator.results.footprint import Series
from orchestrator.results.run_outcome import RunOutcome, run_outcome
from orchestrator.results.trial_outcome import (
    HostOutcome,
    TrialOutcome,
    TrialStatus,
    host_outcome,
    next_attempt,
    trial_outcome,
)
from orchestrator.spec import file as spec_file
from orchestrator.trial.plan import HostTask, host_tasks, plan_trials
from orchestrator.trial.records import Event, HostDone, StepDone
from tests.support.stored import guest_records

S = 1_000_000
SPEC = spec_file.load("quickstart", {"hosts": {"count": 4, "memory": "1GiB"}}).spec
TRIAL = plan_trials(SPEC, "run1")[0]
DONE, UNDECIDED, LOST, CUT_OFF = TrialStatus


@dataclass(frozen=True, kw_only=True)
class Part:
    """The arguments of `host_outcome`: one host's part of a trial."""

    task: HostTask
    events: Sequence[Event]
    series: dict[str, Series]

    @property
    def outcome(self) -> HostOutcome:
        return host_outcome(self.task, self.events, self.series)

    def with_end(self, **changes: Any) -> "Part":
        done = HostDone(host=self.task.host, trial_id=TRIAL.trial_id, at_unix_us=5 * S)
        return replace(self, events=[*self.events, replace(done, **changes)])


def whole(host: str) -> Part:
    """Return a part without a fault: all guests did their steps, were read back and ended."""
    task = host_tasks(SPEC, TRIAL)[host]
    at_us = np.arange(0, 4 * S, S // 10, dtype=np.int64)
    series = Series(
        at_unix_us=at_us,
        resident_bytes=np.full(len(at_us), 10 * MIB, dtype=np.uint64),
        counters={name: at_us.astype(np.uint64) for name in COUNTERS},
    )
    series_of = {guest.name: series for guest in task.guests}
    return Part(task=task, events=guest_records(task), series=series_of)


def untouched(part: Part) -> Part:
    return part


def actor_died(part: Part) -> Part:
    """Add the HostDone that `Fleet` makes for a dead actor, also after the host's own HostDone."""
    return part.with_end(undecided=f"{part.task.host}: its actor died", lost=True)


def host_agent_lost(part: Part) -> Part:
    events = [event for event in part.events if not isinstance(event, HostDone)]
    said = f"{part.task.host}: its host agent was lost"
    return replace(part, events=events[:2]).with_end(undecided=said, lost=True)


def guest_lost(part: Part) -> Part:
    return part.with_end(undecided=f"{part.task.guests[0].name}: lost")


def no_host_done(part: Part) -> Part:
    return replace(part, events=part.events[:-1])


def no_samples(part: Part) -> Part:
    return replace(part, series={})


def samples_with_a_gap(part: Part) -> Part:
    name = part.task.guests[1].name
    all_of_it = part.series[name]
    there = (all_of_it.at_unix_us < S) | (all_of_it.at_unix_us > 3 * S)
    cut = replace(
        all_of_it,
        at_unix_us=all_of_it.at_unix_us[there],
        resident_bytes=all_of_it.resident_bytes[there],
    )
    return replace(part, series=part.series | {name: cut})


def wrong_pages(part: Part) -> Part:
    """Return the part, but with 3 wrong pages in the read-back of the last guest."""
    events = list(part.events)
    last = max(i for i, event in enumerate(events) if isinstance(event, StepDone))
    step = events[last]
    assert isinstance(step, StepDone)
    events[last] = replace(step, wrong_pages=3)
    return replace(part, events=events)


def wrong_pages_then_lost(part: Part) -> Part:
    return actor_died(wrong_pages(part))


Fault = Callable[[Part], Part]
FAULTS: dict[Fault, tuple[TrialStatus, str]] = {
    untouched: (DONE, ""),
    actor_died: (LOST, "host1: its actor died"),
    host_agent_lost: (LOST, "host1: its host agent was lost"),
    guest_lost: (UNDECIDED, "host1-guest1: lost"),
    no_host_done: (UNDECIDED, "host1: did not finish"),
    no_samples: (LOST, "host1-guest1: there are no samples"),
    samples_with_a_gap: (
        LOST,
        "host1-guest2: samples are missing for 2.2 s (one is due every 0.1 s)",
    ),
    wrong_pages: (UNDECIDED, "host1-guest3: 3 pages came back wrong"),
    wrong_pages_then_lost: (UNDECIDED, "host1-guest3: 3 pages came back wrong"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_a_host_came_to(fault: Fault) -> None:
    part = fault(whole("host1"))
    outcome = part.outcome
    assert (outcome.status, outcome.reason) == FAULTS[fault]
    names = [guest.name for guest in part.task.guests]
    assert [figures.guest for figures in outcome.figures] == ["", *names]
    measured = fault in (untouched, wrong_pages)
    for figures in outcome.figures:
        assert (figures.footprint is not None) == measured
        assert figures.undecided == ("" if measured else outcome.reason)
        assert (figures.cost is not None) == (measured and not figures.guest)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(samples_with_a_gap, "samples are missing"), (actor_died, "its actor died")],
)
def test_a_block_without_a_result_is_left_out_and_not_run_again(fault: Fault, said: str) -> None:
    """Its place is beside the other block of its pair."""
    part = fault(whole("host1"))
    switchback = spec_file.load("switchback").spec.switchback
    spec = SPEC.model_copy(update={"switchback": switchback})
    outcome = replace(part, task=replace(part.task, spec=spec)).outcome
    assert outcome.status is UNDECIDED
    assert said in outcome.reason


def test_figures_are_those_of_the_guests_and_their_host() -> None:
    host, *guests = whole("host1").outcome.figures
    assert host.footprint is not None
    assert host.footprint.mean_resident_bytes == 3 * 10 * MIB
    assert host.footprint.verified_pages == 2 * 3
    for guest in guests:
        assert guest.footprint is not None
        assert guest.footprint.peak_resident_bytes == 10 * MIB
    assert host.cost is not None
    assert host.cost.wire_bytes == 3 * 2 * S, "samples of three guests over two seconds"


def of_trial(faults: Sequence[Fault]) -> TrialOutcome:
    return trial_outcome([fault(whole(f"host{i + 1}")).outcome for i, fault in enumerate(faults)])


@given(st.lists(st.sampled_from(list(FAULTS)), min_size=1, max_size=4), st.integers(0, 3))
def test_what_a_trial_came_to_and_whether_it_is_run_again(faults: list[Fault], left: int) -> None:
    outcome = of_trial(faults)
    has_wrong_pages = {wrong_pages, wrong_pages_then_lost} & set(faults)
    failed = {FAULTS[fault][0] for fault in faults} - {DONE}
    if has_wrong_pages:
        assert outcome.status is UNDECIDED
        assert outcome.reason.endswith("3 pages came back wrong")
    elif failed == {LOST}:
        assert outcome.status is LOST
    else:
        assert outcome.status is (UNDECIDED if failed else DONE)
    assert (outcome.reason == "") == (outcome.status is DONE)
    assert len(outcome.figures) == len(faults) * (1 + SPEC.guests_per_host)
    again = next_attempt(TRIAL, outcome.status, left)
    if outcome.status is LOST and left:
        assert again == replace(TRIAL, attempt=2)
    else:
        assert again is None


@pytest.mark.parametrize(
    ("status", "has_result"),
    [(DONE, True), (UNDECIDED, True), (LOST, False), (CUT_OFF, False)],
)
def test_only_a_trial_without_a_result_is_run_again(status: TrialStatus, has_result: bool) -> None:
    assert status.has_result == has_result
    again = next_attempt(replace(TRIAL, attempt=4), status)
    assert again == (None if has_result else replace(TRIAL, attempt=5))


def test_what_a_run_came_to() -> None:
    assert run_outcome(None, []) == RunOutcome(state="done")
    assert run_outcome(None, ["a", "b"]) == RunOutcome(state="undecided", reason="a; b")
    assert run_outcome(ValueError("x"), ["a"]) == RunOutcome(state="failed", reason="ValueError: x")
    interrupted = RunOutcome(state="interrupted", reason="interrupted by the user")
    assert run_outcome(KeyboardInterrupt(), []) == interrupted

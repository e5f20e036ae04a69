"""Reads the contents of a report from the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.sketch import Sketch
from orchestrator.report.curves import Curve, Mark, arm_curve, mean_marks, resident_in_trial
from orchestrator.results.capacity import ArmCapacity, capacities
from orchestrator.results.comparison import ArmCost, compare
from orchestrator.results.footprint import Numbers, Series
from orchestrator.results.frontier import Point, frontier
from orchestrator.results.loop_comparison import ArmLoops, allocation_times, compare_loops
from orchestrator.results.savings import By, Savings, aggregate
from orchestrator.results.store.lock import busy_error
from orchestrator.results.store.reader import Run, Store, StoredTrial
from orchestrator.results.store.run_spec import spec_or_none
from orchestrator.results.store.samples import mean_parts, read_series
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.trial.records import VERIFY, GuestFits, HostRanOut, PhaseStarted, StepDone
from orchestrator.view.answer import capacity_answer, frontier_answer, savings_answer


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a report on one run.

    The arms of `costs`, of `curves`, and of each title in `loops` are in the order of `rows`; some
    may be missing. `allocations` is by title and arm (`loop_comparison.allocation_times`).
    `parts`, what resident memory consisted of, is by arm: means of `mean_parts` over trials.
    `trials` are all attempts. `capacities`, `fills` and `frontier` are empty, unless the figure is
    how many guests a host can run. If it is, only `run`, `trials`, `capacities` and one more are
    set: `fills` if guests were started one by one, `frontier` if their number varied.
    """

    run: Run
    trials: Sequence[StoredTrial] = ()
    rows: Sequence[Savings] = ()
    costs: Sequence[ArmCost] = ()
    loops: Sequence[ArmLoops] = ()
    allocations: Mapping[str, Mapping[str, Sketch]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    marks: Sequence[Mark] = ()
    capacities: Sequence[ArmCapacity] = ()
    fills: Sequence[Fill] = ()
    frontier: Sequence[Point] = ()

    @property
    def arms(self) -> list[str]:
        """The names of all arms: the control first; of a frontier, in the order of the spec."""
        if self.frontier:
            return list(dict.fromkeys(point.arm for point in self.frontier))
        return [row.arm for row in self.rows] or [arm.arm for arm in self.capacities]

    @property
    def answer(self) -> str:
        """The run's answer in one sentence; empty if it has none."""
        if self.frontier:
            return frontier_answer(self.frontier)
        return capacity_answer(self.capacities) or savings_answer(self.rows, self.costs)

    @property
    def reasons(self) -> list[str]:
        """Why arms are undecided, each reason once."""
        found = [row.undecided for row in self.rows] + [arm.undecided for arm in self.capacities]
        return list(dict.fromkeys(filter(None, found)))


@dataclass(frozen=True, kw_only=True)
class Fill:
    """One host in one trial, while its guests were started one by one.

    :ivar used_bytes: how much of its budget the host used when the first, second, ... guest fitted.
    :ivar ran_out: None if all guests fitted.
    """

    arm: str
    used_bytes: tuple[int, ...]
    ran_out: HostRanOut | None


def read_contents(store: Store, run: Run) -> Contents:
    """Read the contents of a report.

    :raises Refused: the run has not ended, no trial is done (of a switchback, in a pair that is
        not left out), or samples are missing or damaged.
    """
    if run.state == "running":
        raise busy_error(run.run_id)
    attempts = store.trials(run.run_id)
    trials = [t for t in attempts if t.counted and t.status is TrialStatus.DONE]
    if not trials:
        raise _nothing_to_show(run)
    if capacity_rows := store.capacity_rows(run.run_id):
        fitted = capacities(capacity_rows)
        if points := frontier(capacity_rows, spec_or_none(run)):
            return Contents(run=run, trials=attempts, capacities=fitted, frontier=points)
        fills = list(_fills(store, run, trials))
        return Contents(run=run, trials=attempts, capacities=fitted, fills=fills)
    footprints = store.footprint_rows(run.run_id)
    of_figures = {(row.arm, row.repetition) for row in footprints if not row.left_out}
    trials = [t for t in trials if (t.arm, t.repetition) in of_figures]
    if not trials:
        raise _nothing_to_show(run)
    phases = _phases(store, run, {trial.trial_id for trial in trials})
    marks = mean_marks([begun for hosts in phases.values() for begun in hosts.values()])
    rows = aggregate(footprints, By.FLEET)
    by_arm: dict[str, list[Numbers]] = {row.arm: [] for row in rows}
    parts: dict[str, list[dict[str, float]]] = {row.arm: [] for row in rows}
    for trial in trials:
        hosts = phases[trial.trial_id]
        folder = store.samples_dir(run.run_id) / trial.trial_id
        guests = _series(folder, list(hosts))
        by_arm[trial.arm].append(resident_in_trial(guests, hosts, marks))
        begins_us = [phase.at_unix_us for of_host in hosts.values() for phase in of_host]
        parts[trial.arm].append(mean_parts(folder, min(begins_us), max(begins_us)))
    cost_rows = store.cost_rows(run.run_id)
    return Contents(
        run=run,
        trials=attempts,
        rows=rows,
        costs=compare(cost_rows, run.driver),
        loops=compare_loops(cost_rows),
        allocations=allocation_times(cost_rows),
        parts={arm: _means(found) for arm, found in parts.items() if found and all(found)},
        curves=[arm_curve(arm, trials, marks) for arm, trials in by_arm.items() if trials],
        marks=marks,
    )


def _nothing_to_show(run: Run) -> Refused:
    return Refused(f"run {run.run_id} has no trial to show: it is {run.state}")


def _means(trials: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fsum(one[name] for one in trials) / len(trials) for name in trials[0]}


def _fills(store: Store, run: Run, trials: Sequence[StoredTrial]) -> Iterator[Fill]:
    fitted: dict[tuple[str, str], list[int]] = {}
    for event in store.events(run.run_id, GuestFits):
        fitted.setdefault((event.trial_id, event.host), []).append(event.used_bytes)
    out = {(event.trial_id, event.host): event for event in store.events(run.run_id, HostRanOut)}
    arms = {trial.trial_id: trial.arm for trial in trials}
    for at in dict.fromkeys((*fitted, *out)):
        if arm := arms.get(at[0]):
            yield Fill(arm=arm, used_bytes=tuple(fitted.get(at, ())), ran_out=out.get(at))


def _series(folder: Path, hosts: Sequence[str]) -> dict[str, list[Series]]:
    series = read_series(folder, hosts)
    if missing := [host for host in hosts if host not in series]:
        raise Refused(
            f"the samples of {missing[0]} are missing in {folder}",
            hint="`hintfleet show` needs no samples: the savings are stored separately",
        )
    return {host: list(series[host].values()) for host in hosts}


def _phases(
    store: Store, run: Run, trial_ids: set[str]
) -> dict[str, dict[str, list[PhaseStarted]]]:
    """Return the phases in the given trials, by trial and host, with times of the host's clock."""
    # A PhaseStarted has the time of the actor's clock. Samples and StepDone have the time of the
    # host's clock, and the host may be another machine (trial/records.py). So the start of a
    # phase is replaced by the time when the first of its guests began its step of that phase.
    steps: dict[tuple[str, str], dict[str, list[int]]] = {}
    for done in store.events(run.run_id, StepDone):
        guests = steps.setdefault((done.trial_id, done.host), {})
        guests.setdefault(done.guest, []).append(done.started_unix_us)
    phases: dict[str, dict[str, list[PhaseStarted]]] = {}
    for event in store.events(run.run_id, PhaseStarted):
        if event.trial_id in trial_ids:
            host_phases = phases.setdefault(event.trial_id, {}).setdefault(event.host, [])
            began_us = _began_us(event, len(host_phases), steps[event.trial_id, event.host])
            host_phases.append(replace(event, at_unix_us=began_us))
    return phases


def _began_us(event: PhaseStarted, number: int, steps: Mapping[str, Sequence[int]]) -> int:
    """Return when the first guest that a phase is about began its step.

    :param number: how many phases were announced before.
    :param steps: when each guest began each of its steps, the read-back last.
    """
    if event.guest and number:
        return steps[event.guest][number]
    # The first phase begins with the earliest first step of any guest, as the measured window does.
    # Guests that are not in step may have different numbers of steps before the read-back.
    place = -1 if event.title == VERIFY else number
    return min(began_us[place] for began_us in steps.values())

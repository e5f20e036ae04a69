"""What a report shows, read from the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hintfleet.errors import Refused
from orchestrator.report.curves import Curve, Mark, course, curve, marks
from orchestrator.results.comparison import ArmCost, compare
from orchestrator.results.footprint import Numbers, Series
from orchestrator.results.savings import By, Savings, aggregate
from orchestrator.results.store.lock import busy_error
from orchestrator.results.store.reader import Run, Store
from orchestrator.results.store.samples import read_series
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.trial.records import PhaseStarted, StepDone


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that is shown of a run; arms in the order of `rows`."""

    run: Run
    rows: Sequence[Savings]
    costs: Sequence[ArmCost]
    curves: Sequence[Curve]
    marks: Sequence[Mark]


def read_contents(store: Store, run: Run) -> Contents:
    """Gather it.

    :raises Refused: the run has not ended, no trial of it came to its end, or samples are
        gone or damaged.
    """
    if run.state == "running":
        raise busy_error(run.run_id)
    trials = [t for t in store.trials(run.run_id) if t.counted and t.status is TrialStatus.DONE]
    if not trials:
        raise Refused(f"run {run.run_id} has no trial that could be shown: it is {run.state}")
    phases = _phases(store, run, {trial.trial_id for trial in trials})
    laid_over = marks([begun for hosts in phases.values() for begun in hosts.values()])
    rows = aggregate(store.footprint_rows(run.run_id), By.FLEET)
    courses: dict[str, list[Numbers]] = {row.arm: [] for row in rows}
    for trial in trials:
        hosts = phases[trial.trial_id]
        folder = store.samples_dir(run.run_id) / trial.trial_id
        guests = {host: list(_series(folder, host)) for host in hosts}
        courses[trial.arm].append(course(guests, hosts, laid_over))
    return Contents(
        run=run,
        rows=rows,
        costs=compare(store.cost_rows(run.run_id), run.driver),
        curves=[curve(arm, found, laid_over) for arm, found in courses.items() if found],
        marks=laid_over,
    )


def _series(folder: Path, host: str) -> Iterable[Series]:
    found = read_series(folder, host)
    if not found:
        raise Refused(
            f"the samples of {host} are gone from {folder}",
            hint="what arms saved is stored apart from them: `hintfleet show`",
        )
    return found.values()


def _phases(
    store: Store, run: Run, trial_ids: set[str]
) -> dict[str, dict[str, list[PhaseStarted]]]:
    """What each host went through, by trial and host, by the clock of its samples: a phase
    began when the first guest began its step. It was announced by another clock."""
    steps: dict[tuple[str, str], dict[str, list[int]]] = {}
    for done in store.events(run.run_id, StepDone):
        guests = steps.setdefault((done.trial_id, done.host), {})
        guests.setdefault(done.guest, []).append(done.started_unix_us)
    found: dict[str, dict[str, list[PhaseStarted]]] = {}
    for event in store.events(run.run_id, PhaseStarted):
        if event.trial_id in trial_ids:
            begun = found.setdefault(event.trial_id, {}).setdefault(event.host, [])
            guests = steps[event.trial_id, event.host]
            began_us = min(starts[len(begun)] for starts in guests.values())
            begun.append(replace(event, at_unix_us=began_us))
    return found

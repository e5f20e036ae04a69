"""What a report shows, read from the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hintfleet.errors import Refused
from orchestrator.comparison import ArmCost
from orchestrator.footprint import Numbers
from orchestrator.records import PhaseStarted
from orchestrator.report.curves import Curve, Mark, course, curve, marks
from orchestrator.savings import By, Savings
from orchestrator.store.lock import busy
from orchestrator.store.reader import Run, Store
from orchestrator.store.samples import read_series


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
        raise busy(run.run_id)
    trials = [
        t for t in store.trials(run.run_id) if t.counted and t.ended_unix_us and not t.undecided
    ]
    if not trials:
        raise Refused(f"run {run.run_id} has no trial that could be shown: it is {run.state}")
    phases = _phases(store, run, {trial.trial_id for trial in trials})
    laid_over = marks([begun for hosts in phases.values() for begun in hosts.values()])
    rows = store.savings(By.FLEET, run.run_id)
    courses: dict[str, list[Numbers]] = {row.arm: [] for row in rows}
    for trial in trials:
        hosts = phases[trial.trial_id]
        folder = store.samples_dir(run.run_id) / trial.trial_id
        guests = {host: list(read_series(folder, host).values()) for host in hosts}
        courses[trial.arm].append(course(guests, hosts, laid_over))
    return Contents(
        run=run,
        rows=rows,
        costs=store.costs(run),
        curves=[curve(arm, found, laid_over) for arm, found in courses.items() if found],
        marks=laid_over,
    )


def _phases(
    store: Store, run: Run, trial_ids: set[str]
) -> dict[str, dict[str, list[PhaseStarted]]]:
    """What each host went through, by trial and host."""
    found: dict[str, dict[str, list[PhaseStarted]]] = {}
    for event in store.events(run.run_id, PhaseStarted):
        if event.trial_id in trial_ids:
            hosts = found.setdefault(event.trial_id, {})
            hosts.setdefault(event.host, []).append(event)
    return found

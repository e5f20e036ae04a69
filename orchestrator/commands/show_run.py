"""The summary of a run that `run` and `show` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hintfleet.errors import ExitCode
from hintfleet.program import printable
from orchestrator.commands.output import emit, savings_as_data
from orchestrator.results.capacity import capacities
from orchestrator.results.comparison import compare
from orchestrator.results.frontier import frontier
from orchestrator.results.loop_comparison import compare_loops
from orchestrator.results.precision import reached
from orchestrator.results.savings import By, Savings, aggregate
from orchestrator.results.statistics import CONFIDENCE
from orchestrator.results.store.reader import Run, Store
from orchestrator.results.store.run_spec import spec_or_none
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.view.glossary import glossary
from orchestrator.view.precision import outcome

if TYPE_CHECKING:
    from rich.console import RenderableType


def print_run(store: Store, run: Run, output_format: str, with_trials: bool = False) -> int:
    """Print a run on stdout; return its exit code.

    Also print on stderr how to resume a run that was cut off or has lost trials, and that undecided
    trials do not run again (those of a switchback are only left out); with JSON and YAML also why
    arms are undecided if the exit code is UNDECIDED, and whether a run that has ended has its
    precision.

    :param with_trials: also print a table of trials, and one of the nodes that the hosts were on;
        JSON and YAML contain them in any case.
    """
    rows = aggregate(store.footprint_rows(run.run_id), By.FLEET)
    emit(
        run_as_data(store, run, rows), output_format, lambda: _tables(store, run, rows, with_trials)
    )
    code = exit_code(run, rows)
    trials = [trial for trial in store.trials(run.run_id) if trial.counted]
    if run.was_cut_off or any(trial.status is TrialStatus.LOST for trial in trials):
        print_resume_hint([run.run_id])
    if any(trial.status is TrialStatus.UNDECIDED for trial in trials) and not run.switchback:
        click.echo("an undecided trial is never run again: only a new run decides it", err=True)
    # The table contains the reasons. JSON and YAML go to a program, so also print the reasons for a
    # person who watches stderr.
    if output_format != "table":
        if code is ExitCode.UNDECIDED:
            # A run with capacities has no rows (`footprint_rows`): its own reason says why.
            reasons = [row.undecided for row in rows] or [run.reason]
            for reason in dict.fromkeys(filter(None, reasons)):
                click.echo(f"undecided: {printable(reason)}", err=True)
        if precision := outcome(run, rows):
            click.echo(precision, err=True)
    return code


def print_resume_hint(run_ids: Sequence[str]) -> None:
    """Print on stderr how to resume the first of these runs; nothing if there is none."""
    # The last 6 characters: a ULID begins with the time, so ids of one day have the same start.
    if run_ids:
        click.echo(f"to resume: hintfleet run --resume {run_ids[0][-6:]}", err=True)


def header_as_data(run: Run) -> dict[str, Any]:
    """Return a run's header as plain data: without the spec, and without the points of recordings,
    of which there may be thousands."""
    header = asdict(run)
    del header["spec_text"]
    if "recordings" in run.overrides:
        header["overrides"] = header["overrides"] | {"recordings": run.recordings}
    return header


def run_as_data(store: Store, run: Run, rows: list[Savings]) -> dict[str, Any]:
    """Return a run as plain data: its header, the units of figures, its arms, capacities, frontier
    and trials.

    If the run has a precision, each arm with an interval of `saved_bytes` says how narrow that is,
    and whether it is narrow enough.
    """
    arms = [savings_as_data(row) for row in rows]
    cost_rows = store.cost_rows(run.run_id)
    costs = {cost.arm: asdict(cost) for cost in compare(cost_rows, run.driver)}
    loops = [asdict(loop) for loop in compare_loops(cost_rows)]
    for arm, row in zip(arms, rows, strict=True):
        del arm["experiment"], arm["spec_hash"], arm["run_id"], arm["key"]
        arm["cost"] = costs.get(arm["arm"])
        found = reached(row, run.precision) if run.precision else None
        arm["precision"] = asdict(found) | {"is_enough": found.is_enough} if found else None
        arm["loops"] = [loop for loop in loops if loop["arm"] == arm["arm"]]
    capacity_rows = store.capacity_rows(run.run_id)
    points = frontier(capacity_rows, spec_or_none(run))
    return header_as_data(run) | {
        "confidence": CONFIDENCE,
        "figures": glossary(),
        "arms": arms,
        # With `vary`, the number of guests is given and they start together: so the rows say
        # whether hosts ran out of memory (`frontier`), not how many guests fit.
        "capacities": [] if points else [asdict(arm) for arm in capacities(capacity_rows)],
        "frontier": [asdict(point) for point in points],
        "trials": [asdict(t) for t in store.trials(run.run_id)],
    }


def exit_code(run: Run, rows: list[Savings]) -> ExitCode:
    """Return the exit code of a run: by its state, and by whether an arm is undecided.

    A run that ends without its precision is done: its intervals hold, they are only wide. UNDECIDED
    is for figures that are missing or do not count.

    :param rows: of the whole fleet (By.FLEET).
    """
    if run.state == "failed":
        return ExitCode.FAILED
    if run.state == "interrupted":
        return ExitCode.INTERRUPTED
    undecided = run.state == "undecided" or any(row.undecided for row in rows)
    return ExitCode.UNDECIDED if undecided else ExitCode.DONE


def _tables(store: Store, run: Run, rows: list[Savings], with_trials: bool) -> Any:
    from rich.console import Group
    from rich.text import Text

    from orchestrator.view import tables
    from orchestrator.view.answer import capacity_answer, frontier_answer, savings_answer
    from orchestrator.view.capacity_table import capacity_summary
    from orchestrator.view.frontier_table import frontier_summary
    from orchestrator.view.loop_tables import LOOP_NOTE, loop_tables
    from orchestrator.view.node_tables import places_table

    cost_rows = store.cost_rows(run.run_id)
    costs = compare(cost_rows, run.driver)
    capacity_rows = store.capacity_rows(run.run_id)
    figures: RenderableType
    spec = spec_or_none(run)
    if points := frontier(capacity_rows, spec):
        answer, figures = frontier_answer(points), frontier_summary(points)
    elif fitted := capacities(capacity_rows):
        answer, figures = capacity_answer(fitted), capacity_summary(fitted)
    elif spec and spec.asks_how_many:
        answer, figures = "", Text("no trial has a figure", style="yellow")
    else:
        answer, figures = savings_answer(rows, costs), tables.savings_and_costs(run, rows, costs)
    parts: list[RenderableType] = [tables.heading(run, answer)]
    if run.state != "running":
        parts.append(figures)
    if loops := compare_loops(cost_rows):
        for table in loop_tables(loops):
            parts += [Text(), table]
        parts += [Text(), LOOP_NOTE]
    if with_trials:
        trials = store.trials(run.run_id)
        parts += [Text(), tables.trials(trials)]
        if run.nodes:
            parts += [Text(), places_table(run, trials)]
    return Group(*parts)

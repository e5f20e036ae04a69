"""The command `hintfleet compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import data_dir_option, data_dir_or_default, output_option

if TYPE_CHECKING:
    from hintfleet.errors import ExitCode
    from orchestrator.results.bounds import Judgement
    from orchestrator.results.changes import Change, RunRows
    from orchestrator.results.store.reader import Run, Store

_EPILOG = """\b
Examples:
  hintfleet compare 4ynra latest
  hintfleet compare 4ynra latest --fail-on 'saved < -5%'
  hintfleet compare 4ynra latest --fail-on 'bitmap.slowdown > 2%' --fail-on 'settle > 0.5s'

\b
A bound is [ARM.]FIGURE < VALUE or [ARM.]FIGURE > VALUE, about the change of the figure from
the first run to the second. It is broken, kept or undecided: the 95 % interval of the change
lies beyond it, within it, or on both sides. Without ARM it is about each arm. Figures:
  saved      mean resident memory less than under the control   % or a size, such as 20MiB
  resident   mean resident memory                               % or a size
  gib_min    resident memory over time                          %
  slowdown   time of the workload's steps over the control's    %
  host_cpu   CPU time of guests and host agents, more than      % or a duration, such as 2s
             under the control, without the cost of observing
  settle     time until 95 % of the memory that comes back      % or a duration
             after a free step is back
  loop_rate  what a guest touched in the workload's loops, in   %
             a second
  allocation_p99   how long 99 % of the loops' allocations took % or a duration, such as 2ms
             at most
  guests     how many fitted, if they were started one by one   %
% is of the figure in the first run; of slowdown: of the steps' time over the control's there.

\b
Exit codes: 0 all bounds are kept; 1 a bound is broken; 2 wrong usage, or runs that cannot be
compared; 3 undecided: a bound or, without --fail-on, a figure.
"""


@click.command(epilog=_EPILOG, short_help="Compare two runs of the same spec: a gate for CI.")
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@click.option(
    "--fail-on",
    "bounds",
    multiple=True,
    metavar="BOUND",
    help="Exit with code 1 if the change is beyond this bound; may be given several times.",
)
@data_dir_option
@output_option
def compare(
    first: str, second: str, bounds: tuple[str, ...], data_dir: Path | None, output_format: str
) -> int:
    """Compare the second RUN with the first, arm by arm, with 95 % intervals.

    Both must be runs of the same spec: then their repetitions have the same seeds, and are
    compared in pairs. Runs that vary the number of guests are not compared. Each RUN is an
    id, a unique part of an id, or `latest`. Another machine or version is a warning on stderr.
    """
    from orchestrator.commands.output import emit
    from orchestrator.results.bounds import judge, parse_bound
    from orchestrator.results.changes import compare_runs
    from orchestrator.results.store.reader import Store
    from orchestrator.view.change_tables import change_tables, comparison_as_data

    wanted = [parse_bound(bound) for bound in bounds]
    with Store(data_dir_or_default(data_dir)) as store:
        runs = store.find_run(first), store.find_run(second)
        _check_same_spec(*runs)
        changes = compare_runs(*(_rows(store, run) for run in runs))
    judgements = [judgement for bound in wanted for judgement in judge(bound, changes)]
    emit(
        comparison_as_data(runs, changes, judgements),
        output_format,
        lambda: change_tables(runs, changes, judgements),
    )
    _warn(runs)
    code = _exit_code(changes, judgements)
    # The tables have the reasons. JSON and YAML go to a program, so a person reads stderr.
    if code and output_format != "table":
        _explain(changes, judgements)
    return code


def _warn(runs: tuple[Run, Run]) -> None:
    from orchestrator.view.change_tables import differences
    from orchestrator.view.figures import state_line

    for run in runs:
        if run.state != "done":
            click.echo(f"warning: {state_line(run.run_id, run.state, run.reason)}", err=True)
    for fact in differences(*runs):
        said = f"{fact['what']}: first {fact['first']}, second {fact['second']}"
        click.echo(f"warning: not the same {said}", err=True)


def _explain(changes: Sequence[Change], judgements: Sequence[Judgement]) -> None:
    from orchestrator.results.bounds import Verdict
    from orchestrator.view.change_tables import undecided, verdict_line

    for judgement in judgements:
        if judgement.verdict is not Verdict.KEPT:
            click.echo(verdict_line(judgement), err=True)
    if not judgements:
        for line in undecided(changes):
            click.echo(f"undecided: {line}", err=True)


def _check_same_spec(first: Run, second: Run) -> None:
    """:raises InvalidInput: both are one run, or they have different specs or drivers."""
    from hintfleet.errors import InvalidInput

    ids = first.run_id[-6:], second.run_id[-6:]
    if first.run_id == second.run_id:
        raise InvalidInput(f"both are run {ids[0]}", hint="`hintfleet runs` lists all runs")
    if first.driver != second.driver:
        raise InvalidInput(
            f"the runs have different drivers: {ids[0]} has {first.driver}, "
            f"{ids[1]} has {second.driver}"
        )
    if first.spec_hash == second.spec_hash:
        return
    if first.annotated_spec == second.annotated_spec:
        read = " and ".join(
            f"hintfleet {run.environment.get('hintfleet', 'unknown')} as {run.spec_hash}"
            for run in (first, second)
        )
        raise InvalidInput(
            f"{ids[0]} and {ids[1]} have the same text as their spec, but it was read by {read}",
            hint="run it again, so that one version has run both",
        )
    raise InvalidInput(
        f"the runs have different specs: {ids[0]} has {first.name} ({first.spec_hash}), "
        f"{ids[1]} has {second.name} ({second.spec_hash})",
        hint=f"diff <(hintfleet show {ids[0]} --spec) <(hintfleet show {ids[1]} --spec)",
    )


def _rows(store: Store, run: Run) -> RunRows:
    """Read the figures of a run.

    :raises InvalidInput: the run has none, or none that are compared.
    """
    from hintfleet.errors import InvalidInput
    from orchestrator.results.changes import RunRows
    from orchestrator.results.store.run_spec import spec_or_none

    spec = spec_or_none(run)
    if spec and spec.vary:
        raise InvalidInput(
            f"run {run.run_id[-6:]} varies the number of guests (vary in its spec): such runs are "
            "not compared, because their figure is how many hosts ran out of memory",
            hint="look at both with `hintfleet show`",
        )
    rows = RunRows(
        footprints=store.footprint_rows(run.run_id),
        costs=store.cost_rows(run.run_id),
        capacities=store.capacity_rows(run.run_id),
    )
    if not rows.footprints and not rows.capacities:
        reason = f": {run.reason}" if run.reason else ""
        raise InvalidInput(f"run {run.run_id[-6:]} has no figures: it is {run.state}{reason}")
    return rows


def _exit_code(changes: Sequence[Change], judgements: Sequence[Judgement]) -> ExitCode:
    from hintfleet.errors import ExitCode
    from orchestrator.results.bounds import Verdict

    verdicts = [judgement.verdict for judgement in judgements]
    if Verdict.BROKEN in verdicts:
        return ExitCode.FAILED
    undecided = Verdict.UNDECIDED in verdicts if verdicts else any(c.undecided for c in changes)
    return ExitCode.UNDECIDED if undecided else ExitCode.DONE

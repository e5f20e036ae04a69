"""The command `hintfleet export`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import data_dir_option, data_dir_or_default

if TYPE_CHECKING:
    from orchestrator.results.store.reader import Run
    from orchestrator.spec.model import Spec

_EPILOG = """\b
Examples:
  hintfleet export latest > samples.csv
  hintfleet export 4ynra --to samples.parquet
  hintfleet export 4ynra --what footprints -o csv | head
  duckdb -c "SELECT arm, avg(resident_bytes) FROM 'samples.parquet' WHERE counted GROUP BY arm"

\b
Each row begins with the parameters of its trial: run_id, experiment, spec_hash, driver, seed,
guest_memory_bytes, trial_id, arm, method, policy, tracker, isolator, repetition (from 0),
attempt, status, counted (false if the trial was run again). Then:
  samples     host, at_unix_us, guest, and the counters of host.proto at that time
  footprints  host, guest (empty: all of the host), and what `show` averages
  events      host, guest, at_unix_us, kind, and the fields of the event as JSON
"""


@click.command(epilog=_EPILOG, short_help="Export the samples of a run as CSV or Parquet.")
@click.argument("run", default="latest")
@click.option(
    "-o",
    "--output",
    "file_format",
    type=click.Choice(("csv", "parquet")),
    help="The format.  [default: parquet if --to ends in .parquet, else csv]",
)
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to this file, and replace it if it exists.  [default: stdout]",
)
@click.option(
    "--what",
    type=click.Choice(("samples", "footprints", "events")),
    default="samples",
    show_default=True,
    help="What the rows are.",
)
@data_dir_option
def export(
    run: str, file_format: str | None, to: Path | None, what: str, data_dir: Path | None
) -> None:
    """Export all samples of a run, with the run's parameters in each row.

    RUN is an id, a unique part of an id, or `latest`. What was measured is exported, also if
    the run was cut off, failed or still runs. Samples are streamed: a large run takes time,
    not memory. FILE appears when it is whole.
    """
    from orchestrator.results.store import export as exports
    from orchestrator.results.store.reader import Store
    from orchestrator.view.figures import state_line

    if file_format is None:
        file_format = "parquet" if to is not None and to.suffix == ".parquet" else "csv"
    if to is None and file_format == "parquet" and sys.stdout.isatty():
        raise click.UsageError("Parquet is not for a terminal: give --to FILE, or -o csv")
    with Store(data_dir_or_default(data_dir)) as store:
        found = store.find_run(run)
        rows = exports.export(
            store, found, exports.What(what), exports.Format(file_format), _spec_of(found)
        )
        with closing(rows) as content:
            _write(content, to)
    if found.state != "done":
        click.echo(state_line(found.run_id, found.state, found.reason), err=True)


def _write(content: Iterator[bytes], to: Path | None) -> None:
    from hintfleet.errors import Refused
    from hintfleet.system.files import written_whole

    if to is None:
        sys.stdout.buffer.writelines(content)
        return
    try:
        with written_whole(to) as file:
            file.writelines(content)
    except OSError as error:
        raise Refused(f"cannot write {to}: {error.strerror or error}") from error


def _spec_of(run: Run) -> Spec | None:
    """Return the spec of a run; print a warning and return None if it cannot be read."""
    from hintfleet.errors import Refused
    from orchestrator.results.store.run_spec import read_spec

    try:
        return read_spec(run).spec
    except Refused as error:
        click.echo(
            "warning: seed, guest_memory_bytes, method, policy, tracker and isolator are empty: "
            f"{error.message}",
            err=True,
        )
        return None

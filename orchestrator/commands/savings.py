"""The command `hintfleet savings`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.options import (
    data_dir_option,
    data_dir_or_default,
    output_option,
    tls_option,
    tls_or_none,
)

_EPILOG = """\b
Examples:
  hintfleet savings                           every run: a row per arm, whole fleet
  hintfleet savings --by host --run latest
  hintfleet savings --by arm --since 7d       runs of the same spec pooled
  hintfleet savings --server 127.0.0.1:50061 -o json
  hintfleet savings --server lab.example.org:50061 --tls ~/operator-alice
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--by",
    type=click.Choice(("fleet", "host", "guest", "arm")),
    default="fleet",
    show_default=True,
    help="One row per arm (fleet), or per arm and host or guest; arm pools runs of a spec.",
)
@click.option("--since", metavar="DURATION", help="Only runs that began within this time, e.g. 1h.")
@click.option("--run", "run_name", default="", metavar="RUN", help="Only this run, or `latest`.")
@click.option(
    "--server", metavar="ADDR", help="Ask the fleet service at ADDR, not the local store."
)
@tls_option
@data_dir_option
@output_option
def savings(
    by: str,
    since: str | None,
    run_name: str,
    server: str | None,
    tls_folder: str,
    data_dir: Path | None,
    output_format: str,
) -> int:
    """Show how much memory each arm saved, compared with the control arm of its run.

    Left out are running runs, and those whose figure is how many guests fit. stderr lists
    every run that is not done. The exit code is 3 if a row is undecided.
    """
    from hintfleet.errors import ExitCode
    from orchestrator.commands.output import emit, savings_as_data
    from orchestrator.results.savings import By
    from orchestrator.results.store.reader import Store
    from orchestrator.service.queries import (
        ask_server,
        ask_store,
        not_done,
        server_runs,
        store_runs,
    )
    from orchestrator.view import tables
    from orchestrator.view.figures import state_line

    since_unix_s = _since_unix_s(since)
    if server:
        tls = tls_or_none(tls_folder)
        rows = ask_server(server, By(by), run_name, since_unix_s, tls)
        runs = server_runs(server, tls)
    else:
        with Store(data_dir_or_default(data_dir)) as store:
            rows = ask_store(store, By(by), run_name, since_unix_s)
            runs = store_runs(store)
    emit([savings_as_data(row) for row in rows], output_format, lambda: tables.savings(rows))
    for run in not_done(runs, run_name, since_unix_s):
        click.echo(state_line(run.run_id, run.state, run.reason), err=True)
    return ExitCode.UNDECIDED if any(row.undecided for row in rows) else ExitCode.DONE


def _since_unix_s(since: str | None) -> int:
    if since is None:
        return 0
    import time

    from hintfleet.units import parse_duration_s

    # At least 1: 0 means all runs (fleet.proto).
    return max(1, int(time.time() - parse_duration_s(since)))

"""The commands `hintfleet runs` and `hintfleet show`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.options import data_dir_option, data_dir_or_default, output_option


@click.command()
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=20, show_default=True,
    help="How many runs to list at most.",
)  # fmt: skip
@data_dir_option
@output_option
def runs(limit: int, data_dir: Path | None, output_format: str) -> None:
    """List the stored runs, newest first."""
    from orchestrator.commands.output import emit
    from orchestrator.commands.show_run import header_as_data, print_resume_hint
    from orchestrator.results.store.reader import Store
    from orchestrator.view import tables

    with Store(data_dir_or_default(data_dir)) as store:
        found = store.runs(limit)
    data = [header_as_data(run) for run in found]
    emit(data, output_format, lambda: tables.runs(found))
    print_resume_hint([run.run_id for run in found if run.was_cut_off])


@click.command(short_help="Show one run: its savings, its trials, and where its hosts ran.")
@click.argument("run", default="latest")
@click.option("--spec", "only_spec", is_flag=True, help="Print only the spec of the run.")
@data_dir_option
@output_option
def show(run: str, only_spec: bool, data_dir: Path | None, output_format: str) -> int:
    """Show one run: the memory that its arms used and saved, its trials, and on which nodes
    of a Ray cluster its hosts ran.

    RUN is an id, a unique part of an id, or `latest`. The exit code is that of the run:
    1 if it failed, 3 if it or an arm is undecided, 130 if it was interrupted.
    """
    from orchestrator.commands.show_run import print_run
    from orchestrator.results.store.reader import Store

    with Store(data_dir_or_default(data_dir)) as store:
        found = store.find_run(run)
        if only_spec:
            click.echo(found.annotated_spec, nl=False)
            return 0
        return print_run(store, found, output_format, with_trials=True)

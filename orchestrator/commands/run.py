"""`hintfleet run`"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import (
    data_dir_option,
    data_dir_or_default,
    libvirt_uri_option,
    output_option,
)

if TYPE_CHECKING:
    from orchestrator.view.live import LiveView, PlainView

_EPILOG = """\b
Examples:
  hintfleet run quickstart
  hintfleet run quickstart-vm -o json > result.json
  hintfleet run my.yaml --host unix:/run/hintfleet/host.sock
"""


@click.command(epilog=_EPILOG, short_help="Run an experiment: a file, or a catalogue name.")
@click.argument("spec")
@click.option(
    "--driver",
    type=click.Choice(("embedded", "libvirt")),
    help="What guests are, instead of what SPEC says.",
)
@click.option(
    "--host",
    "agents",
    multiple=True,
    metavar="ADDR",
    help="A host agent that runs already (unix:PATH or HOST:PORT on loopback), instead of the "
    "hosts in SPEC. May be repeated.",
)
@libvirt_uri_option
@data_dir_option
@output_option
def run(
    spec: str,
    driver: str | None,
    agents: tuple[str, ...],
    libvirt_uri: str,
    data_dir: Path | None,
    output_format: str,
) -> int:
    """Run an experiment: SPEC is a file, or a name that `hintfleet experiments` lists.

    All trials of all arms run, in an order drawn from the seed; what they used and
    saved is stored and printed. Ctrl-C ends all guests and keeps what was stored.
    """
    from orchestrator import spec_file
    from orchestrator.commands.show_run import print_run
    from orchestrator.experiment import overrides, run_experiment
    from orchestrator.store.reader import Store

    loaded = spec_file.load(spec, overrides(driver, agents))
    signal.signal(signal.SIGTERM, _interrupt)
    with Store(data_dir_or_default(data_dir)) as store:
        with _view() as view:
            run_id = run_experiment(loaded, store, view, libvirt_uri)
        code = print_run(store, store.find_run(run_id), output_format)
    _say_where_it_is(run_id, store.folder)
    return code


def _say_where_it_is(run_id: str, folder: Path) -> None:
    """What to do next, on stderr; the end of an id is enough to name a run."""
    short = run_id[-6:]
    click.echo(
        f"\nkept in {folder}\n"
        f"next: hintfleet show {short}      its trials\n"
        f"      hintfleet report {short}    one HTML file with plots",
        err=True,
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _view() -> LiveView | PlainView:
    from rich.console import Console

    from orchestrator.view.live import LiveView, PlainView

    console = Console(stderr=True)
    return LiveView(console) if sys.stderr.isatty() else PlainView(console)

"""`hintfleet run`"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import click

from hintfleet import logs
from hintfleet.settings import Driver
from orchestrator.commands.options import (
    data_dir_option,
    data_dir_or_default,
    libvirt_uri_option,
    output_option,
    tls_option,
    tls_or_none,
)

if TYPE_CHECKING:
    from orchestrator.experiment import Experiment
    from orchestrator.results.store.reader import Store
    from orchestrator.view.live import LiveView, PlainView

_EPILOG = """\b
Examples:
  hintfleet run quickstart
  hintfleet run quickstart-vm -o json > result.json
  hintfleet run my.yaml --host unix:/run/hintfleet/host.sock
  hintfleet run my.yaml --host h1.example.org:7070 --tls ~/operator-alice
  hintfleet run --resume latest
"""


@click.command(epilog=_EPILOG, short_help="Run an experiment: a file, or a catalogue name.")
@click.argument("spec", required=False)
@click.option(
    "--driver",
    type=click.Choice([driver.value for driver in Driver]),
    help="What guests are, instead of what SPEC says.",
)
@click.option(
    "--host",
    "agents",
    multiple=True,
    metavar="ADDR",
    help="A host agent that runs already (unix:PATH or HOST:PORT; off loopback with --tls only), "
    "instead of the hosts in SPEC. May be repeated.",
)
@tls_option
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with this run, as `hintfleet runs` lists it, or `latest`.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=1,
    show_default=True,
    help="How often a trial that was lost with its host is run again, at the end of the run.",
)
@libvirt_uri_option
@data_dir_option
@output_option
def run(
    spec: str | None,
    driver: str | None,
    agents: tuple[str, ...],
    tls_folder: str,
    resume: str | None,
    retries: int,
    libvirt_uri: str,
    data_dir: Path | None,
    output_format: str,
) -> int:
    """Run an experiment: SPEC is a file, or a name that `hintfleet experiments` lists.

    All trials of all arms run, in an order drawn from the seed; what they used and
    saved is stored and printed. Ctrl-C ends all guests and keeps what was stored.

    A run that was cut off, by Ctrl-C, an error, a crash or a power failure, goes on
    with --resume: trials that have a result keep it, the others are run. So are those
    of an undecided run that were lost with a host or with what speaks to it. A run that
    has no such trials is only shown.

    Where there is less memory than the run could come to use, on this machine or in a cgroup
    above this command, nothing is started: exit code 2.
    """
    from orchestrator.commands.show_run import print_run
    from orchestrator.experiment import new_experiment, overrides, stored_experiment
    from orchestrator.results.store.reader import Store

    if (spec is None) == (resume is None):
        raise click.UsageError("give either a SPEC or --resume RUN")
    if resume is not None and (driver or agents):
        raise click.UsageError("--resume runs what the run began with: no --driver, no --host")
    if spec is not None:
        experiment = new_experiment(spec, overrides(driver, agents), libvirt_uri)
    tls_or_none(tls_folder)  # before anything is started
    _check_names()
    interrupts = Interrupts()
    with Store(data_dir_or_default(data_dir)) as store:
        if resume is not None:
            experiment = stored_experiment(store, store.find_run(resume), libvirt_uri)
        run_id = experiment.header.run_id
        ray_spoke = _run(experiment, store, retries, tls_folder, interrupts)
        code = print_run(store, store.find_run(run_id), output_format)
    if ray_spoke:
        log = _log(run_id, store.folder)
        click.echo(f"\nwarning: something went wrong that Ray tells of in {log}", err=True)
    _print_next_steps(run_id, store.folder)
    return code


def _check_names() -> None:
    """Ray sends the command line and the current folder as text: _private/worker.py, `connect`.

    :raises Refused: one of them is none.
    """
    from hintfleet.errors import Refused

    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise Refused("the current folder is gone", hint="go to another one (cd)") from None
    for name in (*sys.argv, folder):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"{name}: Ray cannot run with a name that is not UTF-8",
                hint="reach it by a link with another name (ln -s), and from another folder",
            ) from error


def _run(
    experiment: Experiment, store: Store, retries: int, tls_folder: str, interrupts: Interrupts
) -> bool:
    """Run it; whatever cuts it off, say how to go on.

    Returns whether Ray wrote anything into the run's log meanwhile.
    """
    from hintfleet.errors import HintfleetError
    from orchestrator.commands.show_run import print_resume_hint
    from orchestrator.experiment import run_experiment
    from orchestrator.trial.stray_output import stray_output_to

    run_id = experiment.header.run_id
    if experiment.is_over:
        click.echo(f"run {run_id} has no trial left to run", err=True)
        return False
    log = _log(run_id, store.folder)
    said_before = _size(log)
    try:
        with (
            stray_output_to(log) as terminal,
            logs.written_to(terminal),
            _view(terminal) as view,
        ):
            run_experiment(experiment, store, view, retries, tls_folder, interrupts.check)
    except HintfleetError as error:
        if _size(log) > said_before:
            error.hint += f"{'; ' if error.hint else ''}read what Ray said: {log}"
        if store.has_run(run_id):
            go_on = f"hintfleet run --resume {run_id[-6:]}"
            error.hint += f"; then {go_on}" if error.hint else go_on
        raise
    except KeyboardInterrupt:
        if store.has_run(run_id):
            print_resume_hint([run_id])
        raise
    return _size(log) > said_before


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _log(run_id: str, folder: Path) -> Path:
    """Where what Ray says in a run goes; there only if it said anything."""
    return folder / "logs" / f"{run_id}.log"


def _print_next_steps(run_id: str, folder: Path) -> None:
    """What to do next, on stderr; the end of an id is enough to name a run."""
    short = run_id[-6:]
    click.echo(
        f"\nkept in {folder}\n"
        f"next: hintfleet show {short}      its trials\n"
        f"      hintfleet report {short}    one HTML file with plots",
        err=True,
    )


class Interrupts:
    """Ctrl-C and SIGTERM end a run alike, and for certain: an exception that a signal raises
    is lost if it strikes in a destructor or in a callback of Ray's."""

    def __init__(self) -> None:
        """Take charge of both signals."""
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt


def _view(terminal: TextIO) -> LiveView | PlainView:
    from rich.console import Console

    from orchestrator.view.live import LiveView, PlainView

    console = Console(file=terminal)
    # Log lines would run into the live view.
    live = terminal.isatty() and not logs.are_configured()
    return LiveView(console) if live else PlainView(console)

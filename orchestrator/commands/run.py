"""The command `hintfleet run`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import click

from hintfleet import logs
from hintfleet.settings import Driver
from orchestrator.commands.options import (
    address_option,
    check_names,
    data_dir_option,
    data_dir_or_default,
    libvirt_uri_option,
    output_option,
    tls_option,
    tls_or_none,
)

if TYPE_CHECKING:
    from orchestrator.cluster.ray_cluster import ClusterAddress
    from orchestrator.experiment import Experiment, View
    from orchestrator.results.store.reader import Store

_EPILOG = """\b
Examples:
  hintfleet run quickstart
  hintfleet run quickstart-vm -o json > result.json
  hintfleet run staggered --set guests.stagger=0s --set repetitions=5
  hintfleet run my.yaml --host unix:/run/hintfleet/host.sock
  hintfleet run my.yaml --host h1.example.org:7070 --tls ~/operator-alice
  hintfleet run my.yaml --address auto      on the Ray cluster of this machine
  hintfleet run --resume latest
"""


@click.command(epilog=_EPILOG, short_help="Run an experiment: a file, or a catalogue name.")
@click.argument("spec", required=False)
@click.option(
    "--driver",
    type=click.Choice([driver.value for driver in Driver]),
    help="The driver of the guests, instead of the one in SPEC.",
)
@click.option(
    "--host",
    "agents",
    multiple=True,
    metavar="ADDR",
    help="A running host agent (unix:PATH, or HOST:PORT; off loopback, --tls is required), "
    "instead of the hosts in SPEC. ADDR,node=NAME: it is on that node of the Ray cluster. May be "
    "repeated.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another value for a key of SPEC, both as in a spec; a key within a key follows a dot. "
    "May be repeated.",
)
@tls_option
@address_option
@click.option(
    "--resume",
    metavar="RUN",
    help="Resume this run: an id that `hintfleet runs` lists, or `latest`.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=1,
    show_default=True,
    help="How often a trial (no block of a switchback) is retried that was lost with its host, or "
    "because the host stood still, at the end of the run; with a precision, before each look.",
)
@libvirt_uri_option
@data_dir_option
@output_option
def run(
    spec: str | None,
    driver: str | None,
    agents: tuple[str, ...],
    settings: tuple[str, ...],
    tls_folder: str,
    address: str | None,
    resume: str | None,
    retries: int,
    libvirt_uri: str,
    data_dir: Path | None,
    output_format: str,
) -> int:
    """Run an experiment: SPEC is a file, or a name that `hintfleet experiments` lists.

    All trials of all arms run, in an order drawn from the seed. The memory that they used
    and saved is stored and printed. Ctrl-C ends all guests that the run has made (those of a
    switchback live on, and hint again at once), and keeps the stored results.

    With `precision` in SPEC (5%, or a size), repetitions go on until no interval of an arm's
    savings reaches farther than that from its middle, or max_repetitions have run.

    --resume continues a run that was cut off (Ctrl-C, an error, a crash, a power failure).
    Trials (or pairs of blocks) with a result keep it; the others run, also lost ones: their host
    or its Ray actor ended, or stood still. A run without such trials is only shown.

    Without a Ray cluster (--address), hosts that do not run already run on this machine. If
    they could need more memory than this machine or a cgroup of this command has, nothing is
    started and the exit code is 2. With a cluster, each host needs its memory on its node;
    the run waits for more nodes if it must (timeouts: {nodes: 30s} in SPEC). `hintfleet
    cluster` shows them.
    """
    from orchestrator.cluster.ray_cluster import cluster_address
    from orchestrator.commands.show_run import print_run
    from orchestrator.experiment import new_experiment, overrides, stored_experiment
    from orchestrator.results.store.reader import Store

    if (spec is None) == (resume is None):
        raise click.UsageError("give either a SPEC or --resume RUN")
    if resume is not None and (driver or agents or settings):
        raise click.UsageError("--resume runs its own spec: leave out --driver, --host and --set")
    if spec is not None:
        experiment = new_experiment(spec, overrides(driver, agents, settings), libvirt_uri)
    # Read here only to find a bad folder before anything is started: the actors read the folder of
    # this name on their own nodes.
    tls_or_none(tls_folder)
    cluster = cluster_address(address, os.environ)
    check_names()
    interrupts = Interrupts()
    with Store(data_dir_or_default(data_dir)) as store:
        if resume is not None:
            experiment = stored_experiment(store, store.find_run(resume), libvirt_uri)
        run_id = experiment.header.run_id
        ray_wrote = _run(experiment, store, cluster, retries, tls_folder, interrupts)
        code = print_run(store, store.find_run(run_id), output_format)
    if ray_wrote:
        log = _log(run_id, store.folder)
        click.echo(f"\nwarning: Ray reported problems; read {log}", err=True)
    _print_next_steps(run_id, store.folder)
    return code


def _run(
    experiment: Experiment,
    store: Store,
    cluster: ClusterAddress,
    retries: int,
    tls_folder: str,
    interrupts: Interrupts,
) -> bool:
    """Run the rest of an experiment; if it is over, only say so. If it is cut off after it was
    stored, say how to resume it.

    :returns: whether Ray wrote anything into the run's log during this call.
    """
    from hintfleet.errors import HintfleetError
    from orchestrator.cluster.stray_output import stray_output_to
    from orchestrator.commands.show_run import print_resume_hint
    from orchestrator.experiment import run_experiment

    run_id = experiment.header.run_id
    if experiment.is_over:
        click.echo(f"run {run_id} has no trial left to run", err=True)
        return False
    log = _log(run_id, store.folder)
    size_before = _size(log)
    try:
        with (
            stray_output_to(log) as terminal,
            logs.written_to(terminal),
            _view(terminal) as view,
        ):
            run_experiment(
                experiment,
                store,
                view,
                address=cluster,
                retries=retries,
                tls_folder=tls_folder,
                check=interrupts.check,
            )
    except HintfleetError as error:
        if _size(log) > size_before:
            error.hint += f"{'; ' if error.hint else ''}read Ray's log: {log}"
        # If the error was raised before the run was stored, there is nothing to resume.
        if store.has_run(run_id):
            resume = f"hintfleet run --resume {run_id[-6:]}"
            error.hint += f"; then {resume}" if error.hint else resume
        raise
    except KeyboardInterrupt:
        if store.has_run(run_id):
            print_resume_hint([run_id])
        raise
    return _size(log) > size_before


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _log(run_id: str, folder: Path) -> Path:
    """Return the path of the file that gets Ray's output; after a run it exists only if Ray wrote
    any."""
    return folder / "logs" / f"{run_id}.log"


def _print_next_steps(run_id: str, folder: Path) -> None:
    """Print on stderr where the results are and which commands show them."""
    short = run_id[-6:]
    click.echo(
        f"\nstored in {folder}\n"
        f"next: hintfleet show {short}      its trials\n"
        f"      hintfleet report {short}    one HTML file with plots",
        err=True,
    )


class Interrupts:
    """Handles Ctrl-C and SIGTERM during a run: both end it as interrupted."""

    def __init__(self) -> None:
        """Install the handlers. Call from the main thread."""
        self._received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal was received."""
        if self._received:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        # Both a flag and an exception. The exception ends a wait at once, but Python drops it
        # when the handler happens to run in a destructor ("Exception ignored in __del__") or
        # in a callback of Ray's Cython code. In that case, the next `check` sees the flag and
        # raises KeyboardInterrupt.
        self._received = True
        raise KeyboardInterrupt


@contextmanager
def _view(terminal: TextIO) -> Iterator[View]:
    from rich.console import Console

    from orchestrator.view.live import LiveView, PlainView

    console = Console(file=terminal)
    # Rich redraws by moving the cursor up, and would overwrite log lines between two frames. So
    # with logs, lines are printed and nothing is redrawn.
    if terminal.isatty() and not logs.are_configured():
        with closing(LiveView(console)) as live:
            yield live
    else:
        yield PlainView(console)

"""Shows a run while it runs: LiveView redraws a few lines, PlainView prints line after line.

Both write to the console that they are given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hintfleet.program import printable
from hintfleet.units import format_size
from orchestrator.results.precision import Look
from orchestrator.results.store.writer import RunHeader
from orchestrator.results.trial_outcome import TrialOutcome, TrialStatus
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import Trial
from orchestrator.trial.records import Record
from orchestrator.view.figures import clock, sparkline
from orchestrator.view.precision import look_line
from orchestrator.view.progress import HostGroup, HostProgress, Progress

_FRAMES_PER_S = 5
_BAR_WIDTH = 24
# Up to so many hosts have a line each; if there are more, hosts in the same phase share a line.
_MAX_HOSTS = 12
# How many characters of the terminal's width are kept for all of a host's line but its bars.
_BESIDE_LINE = 60


class LiveView:
    """Redraws a few lines at the bottom of a terminal; `close` clears them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._header: RunHeader | None = None
        self._progress: Progress | None = None
        self._live = Live(
            console=console,
            refresh_per_second=_FRAMES_PER_S,
            transient=True,
            # By default Rich replaces sys.stdout and sys.stderr. That is not needed: during a run
            # both go to a file (orchestrator/cluster/stray_output.py), and nothing else writes to
            # this terminal.
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._render,
        )

    def close(self) -> None:
        """Clear the lines."""
        self._live.stop()

    def starting(
        self, header: RunHeader, trials: tuple[Trial, ...], kept: Mapping[int, TrialStatus]
    ) -> None:
        self._header = header
        self._progress = Progress(trials, time.monotonic(), kept, header.spec.repetitions)
        if header.spec.left_out:
            self._console.print(left_out_note(header.spec), style="dim", highlight=False)
        self._live.start()

    def waiting(self, reason: str) -> None:
        self._console.print(Text(reason, style="yellow"))

    def trial_started(self, trial: Trial) -> None:
        if self._progress:
            self._progress.trial_started(trial, time.monotonic())

    def record(self, record: Record) -> None:
        if self._progress:
            self._progress.record(record)

    def trial_ended(self, trial: Trial, outcome: TrialOutcome) -> None:
        if self._progress:
            self._progress.trial_ended(trial, bool(outcome.reason), time.monotonic())
        if outcome.reason:
            status = f"{outcome.status}: "
            self._console.print(Text.assemble((status, "yellow"), printable(outcome.reason)))

    def looked(self, seen: Look) -> None:
        self._console.print(Text(look_line(seen), style="dim"))

    def _render(self) -> RenderableType:
        if self._header is None or self._progress is None:
            return Text()
        width = self._console.width
        parts: list[RenderableType] = [
            _heading(self._header, self._progress, time.monotonic()),
            Text(),
        ]
        parts.append(_arms(self._progress))
        if self._progress.hosts:
            parts += [Text(), _hosts(self._progress, width)]
        return Group(*parts)


class PlainView:
    """Prints lines, for logs and pipes: when the run starts, waits or looks, when a trial starts,
    and when a trial ends undecided or lost."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def starting(
        self, header: RunHeader, trials: tuple[Trial, ...], kept: Mapping[int, TrialStatus]
    ) -> None:
        self._progress = Progress(trials, time.monotonic(), kept, header.spec.repetitions)
        self._say(f"{header.spec.name}: {header.summary}")
        if header.spec.left_out:
            self._say(left_out_note(header.spec))
        if kept:
            count = _trials(self._progress)
            self._say(f"{len(kept)} of {count} trials have their results and are kept")
        self._say(f"run {header.run_id}: starting hosts")

    def waiting(self, reason: str) -> None:
        self._say(reason)

    def trial_started(self, trial: Trial) -> None:
        if self._progress:
            now_s = time.monotonic()
            self._progress.trial_started(trial, now_s)
            self._say(f"{_position(self._progress)}{_time_left(self._progress, now_s)}")

    def record(self, record: Record) -> None:
        pass

    def trial_ended(self, trial: Trial, outcome: TrialOutcome) -> None:
        if self._progress:
            self._progress.trial_ended(trial, bool(outcome.reason), time.monotonic())
        if outcome.reason:
            self._say(f"{outcome.status}: {printable(outcome.reason)}")

    def looked(self, seen: Look) -> None:
        self._say(look_line(seen))

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def left_out_note(spec: Spec) -> str:
    """Return a line that names the arms that do not run under the spec's driver."""
    return f"left out under the {spec.driver} driver: {', '.join(spec.left_out)}"


def _heading(header: RunHeader, progress: Progress, now_s: float) -> Text:
    return Text.assemble(
        (header.spec.name, "bold"),
        f": {header.summary}\n",
        (f"run {header.run_id}\n", "dim"),
        f"{clock(now_s - progress.started_s)}  {_position(progress)}{_time_left(progress, now_s)}",
    )


def _position(progress: Progress) -> str:
    trial = progress.trial
    if trial is None:
        return "starting hosts"
    return (
        f"trial {trial.position + 1} of {_trials(progress)}: "
        f"{trial.arm.name}, repetition {trial.repetition + 1}"
        f"{f', attempt {trial.attempt}' if trial.attempt > 1 else ''}"
    )


def _trials(progress: Progress) -> str:
    """Return `6`, or `6 to 40` if a run with a precision may end before the last."""
    return _range(progress.least_trials, len(progress.trials))


def _time_left(progress: Progress, now_s: float) -> str:
    left_s = progress.remaining_s(now_s)
    return f", {_range(*map(clock, left_s))} left" if left_s else ""


def _range(least: int | str, most: int | str) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _arms(progress: Progress) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, arm in progress.arms.items():
        count = f"{arm.ended} of {_range(arm.least, arm.most)}"
        note = Text(f"{arm.undecided} undecided" if arm.undecided else "", style="yellow")
        bar = ProgressBar(total=arm.most, completed=arm.ended, width=_BAR_WIDTH)
        grid.add_row(Text(name), bar, count, note)
    return grid


def _hosts(progress: Progress, width: int) -> Table:
    """Return a line for each host; with many hosts, a line for all that are in the same phase. The
    lines are cut to the width of the terminal."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(4):
        grid.add_column(no_wrap=True, overflow="ellipsis")
    line_width = max(0, min(60, width - _BESIDE_LINE))
    if len(progress.hosts) <= _MAX_HOSTS:
        rows = sorted(progress.hosts.items(), key=lambda item: (len(item[0]), item[0]))
        for name, host in rows:
            grid.add_row(Text(name), *_cells(host, line_width))
    else:
        for group in progress.host_groups():
            grid.add_row(Text(_some_of(group.names)), *_cells(group, line_width))
    return grid


def _some_of(names: Sequence[str]) -> str:
    """Return `host3`, `host3, host7`, or `host3 and 38 more`."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"


def _cells(shown: HostProgress | HostGroup, line_width: int) -> tuple[Text, ...]:
    resident_bytes = shown.resident_bytes[-1] if shown.resident_bytes else 0
    line = sparkline(list(shown.resident_bytes), shown.provisioned_bytes, line_width)
    return (
        Text(line, style="cyan"),
        Text(f"{format_size(resident_bytes)} of {format_size(shown.provisioned_bytes)}"),
        Text(shown.phase, style="dim"),
    )

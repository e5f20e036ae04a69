"""Tables for people, and certificates as blocks of lines. Made for 100 columns, readable at 80."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hintfleet.findings import Finding
from hintfleet.program import printable
from hintfleet.settings import Driver
from hintfleet.units import format_size
from orchestrator.results.comparison import ArmCost
from orchestrator.results.footprint import Footprint
from orchestrator.results.savings import Savings
from orchestrator.results.store.reader import Run, StoredTrial
from orchestrator.view.figures import (
    NO_FIGURE,
    clock,
    decimals,
    first_line,
    number_interval,
    pages,
    percent_interval,
    returned,
    seconds_interval,
    settle_time,
    size_interval,
    when,
)
from orchestrator.view.precision import outcome

if TYPE_CHECKING:
    from orchestrator.pki import Certificate

_STATE_STYLES = {
    "done": "green",
    "running": "cyan",
    "undecided": "yellow",
    "failed": "red",
    "interrupted": "yellow",
}
# Columns that tell rows apart. Rich does not wrap them, and shrinks all other columns first.
_NAMES = ("experiment", "run", "of", "arm", "trial")
_NAME_WIDTH = 16
_IN_STEP = 0.99
"""Coincidence from which on guests' workloads are in step. It is below 1 because even guests in
step do not begin each step at the same microsecond."""
_NONE = Text(NO_FIGURE, style="dim")
_SPENT_NOTE = Text(
    "slower, more: than under none, pairs of same seeds, [95 % CI]; host CPU: of guests' processes "
    "and host agents, without the cost of observing them; tracker, a range: memory in a guest, "
    "bytes on the wire",
    style="dim",
)


def table(left: Sequence[str], right: Sequence[str] = (), title: str = "") -> Table:
    """Return an empty table; columns in `right` are right-aligned, for numbers."""
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
        header_style="bold",
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for column in left:
        result.add_column(column, no_wrap=column in _NAMES)
    for column in right:
        # Folded: otherwise Rich would cut a figure that does not fit, and people would read
        # another figure.
        result.add_column(column, justify="right", overflow="fold")
    return result


def heading(run: Run, answer: str) -> RenderableType:
    """Return the top of a run's summary: its size and state; once it has ended, its answer."""
    top = Text.assemble(
        (run.name, "bold"), f": {run.summary}\n", (f"run {run.run_id}, ", "dim"), _state(run)
    )
    if run.state == "running":
        return Group(top, Text(), Text("still running: there are figures when it has ended"))
    return Group(top, Text(), Text(answer, "bold"), Text()) if answer else Group(top, Text())


def savings_and_costs(
    run: Run, rows: Sequence[Savings], costs: Sequence[ArmCost]
) -> RenderableType:
    """Return the tables of what the arms of a run saved and cost."""
    parts: list[RenderableType] = [savings(rows)]
    if precision := outcome(run, rows):
        parts.append(Text(precision))
    if costs:
        parts += [Text(), cost_table(costs), Text(), _SPENT_NOTE]
    return Group(*parts)


def savings(rows: Sequence[Savings]) -> RenderableType:
    """Return the tables of savings: memory used and returned, and why rows are undecided.

    Without rows, return a sentence.
    """
    if not rows:
        return Text("no trials have ended")
    reasons = [
        Text.assemble(("undecided: ", "yellow"), first_line(reason))
        for reason in dict.fromkeys(row.undecided for row in rows)
        if reason
    ]
    note = Text("saved: less mean resident memory than under none, pairs of same seeds", "dim")
    if any(row.saved_bytes and row.saved_bytes.first_look for row in rows):
        note.append("; intervals hold whenever a run stops (docs/statistics.md)")
    if coincidence := _coincidence(rows):
        note.append(coincidence)
    left_out = [
        Text(line, style="yellow") for line in dict.fromkeys(map(left_out_line, rows)) if line
    ]
    return Group(memory(rows), Text(), returned_memory(rows), Text(), note, *left_out, *reasons)


def left_out_line(row: Savings) -> str:
    """Return how many pairs are left out of a row of a switchback; empty if none is."""
    if not row.left_out_pairs:
        return ""
    of = f"{row.left_out_pairs} of {row.pairs}"
    return f"left out: {of} pairs of blocks; `hintfleet show RUN` says why"


def _coincidence(rows: Sequence[Savings]) -> str:
    """Return how far the peaks of guests coincide; empty if all are in step or it is unknown."""
    found = [row.footprint.coincidence for row in rows if row.footprint]
    apart = [share for share in found if share is not None and share < _IN_STEP]
    if not apart:
        return ""
    percent = f"{100 * min(apart):.0f}"
    if (most := f"{100 * max(apart):.0f}") != percent:
        percent = f"{percent} to {most}"
    return (
        f"\npeaks of guests coincide to {percent} %: that is the most that their workloads held at "
        "a time, of the sum of the most that each held"
    )


def _names(rows: Sequence[Savings]) -> tuple[str, ...]:
    """Return the columns that name a row: `arm`; `of` if rows are of single hosts or guests; `run`
    if there are several runs; `experiment` if there are several, or if runs are pooled (By.ARM)."""
    columns = []
    if len({row.experiment for row in rows}) > 1 or not rows[0].run_id:
        columns.append("experiment")
    if len({row.run_id for row in rows}) > 1:
        columns.append("run")
    if any(row.key for row in rows):
        columns.append("of")
    return (*columns, "arm")


_Names = dict[tuple[str, str], str]


def _experiments(rows: Sequence[Savings]) -> _Names:
    """Return what to call each spec, by its hash and name: the name; with the hash, if several
    specs have it. (A fleet service of an earlier version sends no hashes.)"""
    specs = {(row.spec_hash, row.experiment) for row in rows}
    counts = Counter(name for _, name in specs)
    return {
        (spec_hash, name): f"{name} {spec_hash[:6]}" if counts[name] > 1 else name
        for spec_hash, name in specs
    }


def _name_cells(names: Sequence[str], row: Savings, experiments: _Names) -> list[Text]:
    experiment = experiments[row.spec_hash, row.experiment]
    values = {"experiment": experiment, "run": row.run_id[-6:], "of": row.key, "arm": row.arm}
    return [name_cell(values[name]) for name in names]


def name_cell(name: str) -> Text:
    """Return a whole name, wrapped into lines of at most 16 characters."""
    # An arm's name may have 40 characters: on one line it would leave no space for figures.
    return Text(textwrap.fill(printable(name), _NAME_WIDTH))


def memory(rows: Sequence[Savings]) -> Table:
    """Return the table of the memory that arms used and saved."""
    names, experiments = _names(rows), _experiments(rows)
    result = table(
        names,
        (
            "provi-\nsioned",
            "peak\nresident",
            "mean\nresident",
            "\nGiB·min",
            "saved\n\\[95 % CI]",
            "GiB·min saved\n\\[95 % CI]",
        ),
    )
    for row in rows:
        cells = _name_cells(names, row, experiments)
        result.add_row(*cells, *_footprint_cells(row.footprint), *_saved(row))
    return result


def _footprint_cells(footprint: Footprint | None) -> list[str]:
    if footprint is None:
        return [NO_FIGURE] * 4
    sizes = (
        footprint.provisioned_bytes,
        footprint.peak_resident_bytes,
        footprint.mean_resident_bytes,
    )
    gib_min = footprint.resident_gib_min
    return [*map(format_size, sizes), f"{gib_min:.{decimals(gib_min)}f}"]


def _saved(row: Savings) -> list[Text]:
    if row.undecided:
        return [Text("undecided", style="yellow")] * 2
    if row.saved_bytes is None or row.saved_gib_min is None:
        return [_NONE] * 2
    style = "green" if row.saved_bytes.low > 0 else ""
    return [
        Text(size_interval(row.saved_bytes), style=style),
        Text(number_interval(row.saved_gib_min), style=style),
    ]


def returned_memory(rows: Sequence[Savings]) -> Table:
    """Return the table of the memory that came back, and whether workloads kept their data."""
    names, experiments = _names(rows), _experiments(rows)
    result = table(
        names,
        (
            "trials",
            "freed memory\nthat left",
            "reclaimed\nat the end",
            "refaulted",
            "workload verified",
        ),
    )
    for row in rows:
        cells = _name_cells(names, row, experiments)
        result.add_row(*cells, str(row.trials), *_came_back_cells(row.footprint))
    return result


def _came_back_cells(footprint: Footprint | None) -> list[Text]:
    if footprint is None:
        return [_NONE] * 4
    return [
        Text(returned(footprint.returned)),
        Text(format_size(footprint.reclaimed_now_bytes)),
        Text(format_size(footprint.refaulted_total_bytes)),
        Text(
            pages(footprint.verified_pages, footprint.wrong_pages),
            style="red" if footprint.wrong_pages else "",
        ),
    ]


def cost_table(costs: Sequence[ArmCost]) -> Table:
    """Return the table of the costs of arms."""
    result = table(
        ("arm",),
        (
            "95 % back\nafter",
            "workload\nslower",
            "guest CPU\nmore",
            "host CPU\nmore",
            "to\nobserve",
            "tracker,\na range",
        ),
    )
    for cost in costs:
        per_range = cost.wire_bytes_per_range
        result.add_row(
            name_cell(cost.arm),
            settle_time(cost),
            percent_interval(cost.slowdown_percent),
            seconds_interval(cost.guest_cpu_s),
            seconds_interval(cost.host_cpu_s),
            NO_FIGURE if cost.observing_cpu_s is None else f"{cost.observing_cpu_s:.2f} s",
            f"{format_size(cost.tracker_bytes) if cost.tracker_bytes else NO_FIGURE}\n"
            f"{NO_FIGURE if per_range is None else f'{per_range:.1f} B'}",
        )
    return result


def runs(found: Sequence[Run]) -> RenderableType:
    """Return the table of stored runs, or a sentence if there are none."""
    if not found:
        return Text("no runs yet; start one with `hintfleet run quickstart`")
    result = table(("run", "experiment", "started"), ("took",))
    result.add_column("state", overflow="fold")
    for run in found:
        result.add_row(
            run.run_id, name_cell(run.name), when(run.started_unix_us), _took(run), _state(run)
        )
    return result


def trials(found: Sequence[StoredTrial]) -> RenderableType:
    """Return the table of the attempts at a run's trials, in the order of `found`."""
    result = table(("trial", "arm"), ("repetition", "took"))
    result.add_column("state", overflow="fold")
    for trial in found:
        ended = trial.ended_unix_us
        took = clock((ended - trial.started_unix_us) / 1e6) if ended else NO_FIGURE
        result.add_row(
            str(trial.position + 1),
            name_cell(trial.arm),
            str(trial.repetition + 1),
            took,
            _trial_state(trial),
        )
    return result


def _trial_state(trial: StoredTrial) -> Text:
    # Text, not str: a reason may quote a guest, and Rich would read its brackets as markup.
    state = str(trial.status)
    if trial.undecided:
        state += f": {first_line(trial.undecided)}"
    return Text(state if trial.counted else f"{state} (not counted: it was run again)")


def findings(found: Sequence[Finding], can_run: Mapping[Driver, bool]) -> RenderableType:
    """Return the table of the doctor's findings, grouped by the driver that needs them.

    :param can_run: whether guests of each driver can run, in the order of the groups.
    """
    result = table(("", "looked at", "found"))
    for driver, ok in can_run.items():
        for finding in found:
            if finding.needed_for == driver:
                result.add_row(_mark(finding.ok), Text(finding.name), Text(_detail(finding)))
        missing = [
            finding.name for finding in found if finding.needed_by(driver) and not finding.ok
        ]
        verdict = "can run" if ok else f"cannot run: {', '.join(missing)}"
        result.add_row(_mark(ok), f"{driver} guests", Text(verdict), style="bold", end_section=True)
    return result


def _detail(finding: Finding) -> str:
    if finding.ok or not finding.hint:
        return finding.detail
    return f"{finding.detail}\ntry: {finding.hint}"


def certificates(found: Sequence[Certificate]) -> RenderableType:
    """Return the contents of certificates, a block of lines each."""
    # Not a table: a narrow column would cut a fingerprint, and a part of a fingerprint proves
    # nothing.
    return Group(*(line for one in found for line in _certificate(one)))


def _certificate(one: Certificate) -> Iterator[Text]:
    style = "green" if one.state == "valid" else "red"
    yield Text.assemble(
        (f"{one.role or 'no role'} {one.name}", "bold"),
        (f"  {one.state}", style),
        f", until {one.not_after[:10]}",
    )
    if at := [subject for subject in one.subjects if not subject.startswith("urn:")]:
        yield Text(f"  at {', '.join(at)}")
    yield Text(f"  sha256 {one.fingerprint}")
    yield Text(f"  {one.path}", style="dim", overflow="fold")


def _mark(ok: bool) -> Text:
    return Text("yes", style="green") if ok else Text("no ", style="red")


def _took(run: Run) -> str:
    if not run.ended_unix_us:
        return NO_FIGURE
    return clock((run.ended_unix_us - run.started_unix_us) / 1e6)


def _state(run: Run) -> Text:
    state = Text(run.state, style=_STATE_STYLES.get(run.state, ""))
    return state.append(f": {first_line(run.reason)}", style="") if run.reason else state

"""Tables of what the loops of a workload measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from hintfleet.units import GIB, PAGE_BYTES
from orchestrator.results.loop_comparison import ArmLoops, LoopFigure
from orchestrator.spec.phases import Kind
from orchestrator.view.figures import NO_FIGURE, decimals, percent_interval
from orchestrator.view.tables import name_cell, table

LOOP_NOTE = Text(
    "cycles: in one guest; allocation: of 2 MiB, with the first write to it; p1: the rate in the "
    "slowest 1 % of all 100 ms, at most; %: more than under none, pairs of same seeds, [95 % CI]",
    style="dim",
)


def _number(value: float) -> str:
    return f"{value:,.{decimals(value)}f}"


def _milliseconds(us: float) -> str:
    return f"{_number(us / 1000)} ms"


def _pages(bytes_per_s: float) -> str:
    return f"{_number(bytes_per_s / PAGE_BYTES)}/s"


def _gib(bytes_per_s: float) -> str:
    return f"{_number(bytes_per_s / GIB)} GiB/s"


_Column = tuple[str, str, Callable[[float], str]]
"""A heading, a figure of ArmLoops, and how to write its values."""

_COLUMNS: Mapping[str, Sequence[_Column]] = {
    Kind.CHURN: (
        ("\ncycles", "cycles", _number),
        ("allocation\np50", "allocation_p50_us", _milliseconds),
        ("allocation\np99", "allocation_p99_us", _milliseconds),
    ),
    Kind.FAULT: (
        ("\npages", "bytes_per_s", _pages),
        ("pages\np1", "bytes_per_s_p1", _pages),
        ("allocation\np99", "allocation_p99_us", _milliseconds),
    ),
    Kind.BANDWIDTH: (
        ("read and\nwritten", "bytes_per_s", _gib),
        ("read and\nwritten, p1", "bytes_per_s_p1", _gib),
    ),
}


def loop_tables(loops: Sequence[ArmLoops]) -> list[Table]:
    """Return a table for each title of loops, with a row for each arm."""
    titles = dict.fromkeys(row.title for row in loops)
    return [_table(title, [row for row in loops if row.title == title]) for title in titles]


def _table(title: str, rows: Sequence[ArmLoops]) -> Table:
    columns = _COLUMNS[rows[0].kind]
    result = table(("\narm",), [heading for heading, _, _ in columns], title=title)
    for row in rows:
        cells = (_cell(getattr(row, figure), write) for _, figure, write in columns)
        result.add_row(name_cell(row.arm), *cells)
    return result


def _cell(figure: LoopFigure | None, write: Callable[[float], str]) -> Text:
    if figure is None:
        return Text(NO_FIGURE, style="dim")
    more = figure.more_percent
    return Text(write(figure.mean) + (f"\n{percent_interval(more)}" if more else ""))

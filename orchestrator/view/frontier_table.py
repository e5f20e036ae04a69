"""The table of how often hosts ran out of memory, by their number of guests."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.results.frontier import Point
from orchestrator.view.capacity_table import with_notes
from orchestrator.view.tables import name_cell, table

NOTE = (
    "a cell: hosts of all trials that ran out of memory before their guests had done their "
    "workload, of how many, and the 95 % interval of the share (Clopper and Pearson); × host: "  # noqa: RUF001
    "the memory of these guests / that of their host"
)


def frontier_summary(points: Sequence[Point]) -> RenderableType:
    """Return the table of points with notes, and why points are undecided."""
    return with_notes(frontier_table(points), NOTE, points)


def frontier_table(points: Sequence[Point]) -> Table:
    """Return the table of points: a row for each arm, a column for each number of guests."""
    numbers = {point.guests: point.overcommit for point in points}
    result = table(("arm",), [_heading(guests, numbers[guests]) for guests in sorted(numbers)])
    for arm in dict.fromkeys(point.arm for point in points):
        cells = {point.guests: _cell(point) for point in points if point.arm == arm}
        result.add_row(name_cell(arm), *(cells.get(guests, Text()) for guests in sorted(numbers)))
    return result


def _heading(guests: int, overcommit: float | None) -> str:
    return f"{guests} guest{'' if guests == 1 else 's'}" + (
        f"\n{overcommit:.2g} × host" if overcommit else ""  # noqa: RUF001
    )


def _cell(point: Point) -> Text:
    if point.undecided:
        return Text("undecided", style="yellow")
    style = "yellow" if point.ran_out else "green"
    share = f"{100 * point.low:.0f} to {100 * point.high:.0f} %"
    return Text.assemble((f"{point.ran_out} of {point.hosts}\n", style), (share, "dim"))

"""The table of how many guests fitted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.results.capacity import ArmCapacity
from orchestrator.results.frontier import Point
from orchestrator.view.answer import guests_text, more_text
from orchestrator.view.figures import NO_FIGURE, first_line
from orchestrator.view.tables import name_cell, table

_NOTE = (
    "fit: guests that have done their workload before the host ran out of memory, all hosts "
    "together; more: than under none, pairs of same seeds"
)
_WATCHED = (
    "the hosts' memory was only watched: no cgroup could be made for it here, so a host ran out "
    "when its guests used more, without what their processes use"
)


def capacity_summary(arms: Sequence[ArmCapacity]) -> RenderableType:
    """Return the table of the arms' capacities with notes, and why arms are undecided."""
    return with_notes(capacity_table(arms), _NOTE, arms)


def with_notes(shown: Table, note: str, figures: Sequence[ArmCapacity | Point]) -> RenderableType:
    """Return `shown`; below it `note`, that budgets were only watched if some were, and why figures
    are undecided."""
    parts: list[RenderableType] = [shown, Text(), Text(note, "dim")]
    if any(figure.watched for figure in figures):
        parts.append(Text(_WATCHED, "yellow"))
    for reason in dict.fromkeys(figure.undecided for figure in figures if figure.undecided):
        parts.append(Text.assemble(("undecided: ", "yellow"), first_line(reason)))
    return Group(*parts)


def capacity_table(arms: Sequence[ArmCapacity]) -> Table:
    """Return the table of the arms' capacities."""
    result = table(("arm",), ("trials", "guests\nthat fit", "fewest\nto most", "more\n\\[95 % CI]"))
    for arm in arms:
        result.add_row(name_cell(arm.arm), str(arm.trials), *_cells(arm))
    return result


def _cells(arm: ArmCapacity) -> list[Text]:
    if arm.guests is None:
        return [Text("undecided", style="yellow"), Text(NO_FIGURE), Text(NO_FIGURE)]
    spread = f"{arm.fewest} to {arm.most}" if arm.fewest < arm.most else f"{arm.fewest}"
    more = Text(NO_FIGURE, style="dim")
    if arm.more is not None:
        more = Text(
            more_text(arm.more).replace(" ", "\n", 1), style="green" if arm.more.low > 0 else ""
        )
    return [Text(guests_text(arm)), Text(spread), more]

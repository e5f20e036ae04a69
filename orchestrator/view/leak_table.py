"""The table of the leaks that `doctor --leaks` and `doctor --clean` find."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from hintfleet.leaks import Leak
from hintfleet.units import format_size
from orchestrator.view.figures import NO_FIGURE, when
from orchestrator.view.tables import table


def leak_table(leaks: Sequence[Leak], *, all_looked_at: bool) -> RenderableType:
    """Return a table with a row per leak, or a sentence if there is none.

    A second line below a leak's place says that the leak was removed, or why it was not or must
    not be removed. For any other leak it says how we know that nobody owns the leak.

    :param all_looked_at: False if something could not be checked; then the sentence says so.
    """
    if not leaks:
        if all_looked_at:
            return Text("nothing is left of earlier crashes")
        return Text("nothing was found, but not everything could be checked")
    shown = table(("what", "where"), ("since", "size"))
    for leak in leaks:
        shown.add_row(
            leak.what,
            Text(f"{leak.where}\n{_fate(leak)}"),
            when(leak.since_unix_s * 1_000_000) if leak.since_unix_s else NO_FIGURE,
            format_size(leak.size_bytes),
        )
    return shown


def _fate(leak: Leak) -> str:
    if leak.removed:
        return "removed"
    return f"not removed: {leak.kept}" if leak.kept else leak.why

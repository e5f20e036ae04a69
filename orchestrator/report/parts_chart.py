"""Builds the chart of what resident memory consisted of."""

from __future__ import annotations

import altair as alt

from hintfleet.units import MIB
from orchestrator.report.contents import Contents
from orchestrator.report.style import WIDTH, VegaLite, chart, styled

# The parts' names for people, and colours, in their order in a bar: what the guest uses, then what
# is free.
_PARTS = {
    "used": ("used", "#0072b2"),
    "file_cache": ("file cache", "#56b4e9"),
    "held_back": ("held back", "#009e73"),
    "in_flight": ("in flight", "#e69f00"),
    "waiting": ("waiting", "#d55e00"),
    "free_pieces": ("in pieces", "#cc79a7"),
}


def parts_chart(contents: Contents) -> VegaLite | None:
    """Return the chart of what the resident memory of all guests consisted of, as their agents
    said: a bar for each arm, of the mean of each part. None if no arm has such figures."""
    rows = [
        {"arm": arm, "part": shown, "mib": parts[name] / MIB, "place": place}
        for arm, parts in contents.parts.items()
        for place, (name, (shown, _)) in enumerate(_PARTS.items())
    ]
    if not rows:
        return None
    names, colours = zip(*_PARTS.values(), strict=True)
    bars = (
        chart(rows)
        .mark_bar(size=18)
        .encode(
            y=alt.Y("arm:N", title=None, sort=list(contents.parts)),
            x=alt.X("mib:Q", title="resident, MiB, mean over time"),
            order="place:Q",
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=names, range=colours),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=[
                alt.Tooltip("arm:N"),
                alt.Tooltip("part:N"),
                alt.Tooltip("mib:Q", format=".1f"),
            ],
        )
    )
    return styled(
        bars.properties(width=WIDTH, height=alt.Step(30)),
        "What the resident memory of guests consisted of under each arm with hinting.",
    )

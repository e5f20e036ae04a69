"""Builds the charts of how long allocations took in loops of a workload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from hintfleet.sketch import Sketch
from orchestrator.report.contents import Contents
from orchestrator.report.style import WIDTH, VegaLite, arm_lines, chart, styled

_HEIGHT = 260
_US_PER_MS = 1000


def allocation_charts(contents: Contents) -> dict[str, VegaLite]:
    """Return a chart for each title of loops that allocate: under each arm, the share of
    allocations (of all guests and trials) that took at most so long."""
    return {title: _chart(contents, arms) for title, arms in contents.allocations.items()}


def _chart(contents: Contents, arms: Mapping[str, Sketch]) -> VegaLite:
    rows = [row for arm, times_us in arms.items() for row in _steps(arm, times_us)]
    x = alt.X(
        "ms:Q",
        title="allocation of 2 MiB with the first write to it, ms",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~g"),
    )
    y = alt.Y("share:Q", title="of all allocations took at most so long", axis=alt.Axis(format="%"))
    colour = arm_lines(contents)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("ms:Q", format=".3g", title="at most, ms"),
        alt.Tooltip("share:Q", format=".1%"),
    ]
    return styled(
        chart(rows)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
        .properties(width=WIDTH, height=_HEIGHT),
        "The share of allocations that took at most so long, a line for each arm; median and 99th "
        "percentile are in the table.",
    )


def _steps(arm: str, times_us: Sketch) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "ms": value_us / _US_PER_MS, "share": share}
        for value_us, share in times_us.cumulative()
    ]

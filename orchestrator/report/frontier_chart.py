"""Builds the chart of how many hosts ran out of memory, for a run whose arms ran with several
numbers of guests."""

from __future__ import annotations

import altair as alt

from orchestrator.report.contents import Contents
from orchestrator.report.style import WIDTH, VegaLite, arm_lines, chart, styled, title

_HEIGHT = 360


def frontier_chart(contents: Contents) -> VegaLite:
    """Return the chart of the share of hosts that ran out of memory, over their number of guests: a
    line for each arm, with the 95 % interval of each point."""
    arms = contents.arms
    # Moved apart a little: the points of several arms at 0 or 100 % would hide each other.
    shift = {arm: 0.06 * (i - (len(arms) - 1) / 2) for i, arm in enumerate(arms)}
    rows = [
        {
            "arm": point.arm,
            "guests": point.guests,
            "at": point.guests + shift[point.arm],
            "share": point.ran_out / point.hosts,
            "low": point.low,
            "high": point.high,
            "hosts": f"{point.ran_out} of {point.hosts}",
            "overcommit": point.overcommit,
        }
        for point in contents.frontier
        if point.hosts
    ]
    x = alt.X(
        "at:Q",
        title="guests on a host",
        axis=alt.Axis(format="d", tickMinStep=1),
        scale=alt.Scale(zero=False, nice=False, padding=12),
    )
    y = alt.Y("share:Q", title="hosts that ran out of memory", axis=alt.Axis(format=".0%"))
    colour = arm_lines(contents)
    base = chart(rows)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("guests:Q"),
        alt.Tooltip("hosts:N", title="ran out"),
        alt.Tooltip("overcommit:Q", title="guests' memory / host's", format=".2f"),
    ]
    return styled(
        alt.layer(
            base.mark_rule(opacity=0.45, strokeWidth=1.5).encode(
                x=x,
                y=alt.Y("low:Q", title="hosts that ran out of memory"),
                y2="high:Q",
                color=colour,
            ),
            base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour),
            base.mark_point(filled=True, size=55, opacity=1).encode(
                x=x, y=y, color=colour, tooltip=tooltip
            ),
        ).properties(
            width=WIDTH,
            height=_HEIGHT,
            title=title(
                contents,
                "hosts that ran out of memory, by their number of guests",
                "Bars: 95 % interval of the share.",
            ),
        ),
        "The share of hosts that ran out of memory over the number of guests on a host, a line for "
        "each arm; the figures are in the table.",
    )

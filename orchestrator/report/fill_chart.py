"""Builds the chart of a run whose guests were started one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from hintfleet.units import GIB
from orchestrator.report.contents import Contents, Fill
from orchestrator.report.style import FAINT, WIDTH, VegaLite, arm_lines, chart, styled, title

_HEIGHT = 360


def fill_chart(contents: Contents) -> VegaLite:
    """Return the chart of the memory that hosts used as guests were added.

    Each host of each trial has a line with a point for each guest that fitted, in the colour of its
    arm. If the host ran out of memory, its line ends with a cross: the next guest did not fit. A
    rule across the chart marks the memory of the hosts that ran out.
    """
    points = list(_points(contents.fills))
    x = alt.X("guests:Q", title="guests on the host", axis=alt.Axis(format="d", tickMinStep=1))
    y = alt.Y("used:Q", title="used on the host, GiB", scale=alt.Scale(zero=True))
    colour = arm_lines(contents)
    lines = chart(points).mark_line(strokeWidth=2, opacity=0.8)
    fitted = chart([point for point in points if not point["ran_out"]])
    dots = fitted.mark_point(filled=True, size=45, opacity=1).encode(
        x=x,
        y=y,
        color=colour,
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("guests:Q", title="guests"),
            alt.Tooltip("used:Q", title="used, GiB", format=".2f"),
        ],
    )
    ends = (
        chart([point for point in points if point["ran_out"]])
        .mark_point(shape="cross", angle=45, size=160, opacity=0.8, filled=True)
        .encode(x=x, y=y, color=colour, tooltip=[alt.Tooltip("arm:N"), alt.Tooltip("guests:Q")])
    )
    return styled(
        alt.layer(
            *_limits(contents.fills),
            lines.encode(x=x, y=y, color=colour, detail="line:N"),
            dots,
            ends,
        ).properties(
            width=WIDTH,
            height=_HEIGHT,
            title=title(
                contents,
                "memory of a host as guests are added",
                "Lines: one host in one trial; cross: the next guest did not fit.",
            ),
        ),
        "Memory used on a host over the number of its guests, a line for each trial; how many "
        "fitted is in the table.",
    )


def _points(fills: Sequence[Fill]) -> Iterator[dict[str, Any]]:
    for line, fill in enumerate(fills):
        yield _point(line, fill, 0, 0, ran_out=False)
        for i, used_bytes in enumerate(fill.used_bytes):
            yield _point(line, fill, i + 1, used_bytes, ran_out=False)
        if fill.ran_out:
            yield _point(
                line, fill, len(fill.used_bytes) + 1, fill.ran_out.limit_bytes, ran_out=True
            )


def _point(line: int, fill: Fill, guests: int, used_bytes: int, *, ran_out: bool) -> dict[str, Any]:
    return {
        "line": line,
        "arm": fill.arm,
        "guests": guests,
        "used": round(used_bytes / GIB, 4),
        "ran_out": ran_out,
    }


def _limits(fills: Sequence[Fill]) -> list[alt.Chart]:
    limits = {fill.ran_out.limit_bytes for fill in fills if fill.ran_out}
    rows = [{"limit": limit / GIB, "text": "the host's memory"} for limit in sorted(limits)]
    base = chart(rows)
    rule = base.mark_rule(color=FAINT, strokeDash=[6, 3]).encode(y="limit:Q")
    text = base.mark_text(align="left", dx=6, dy=-8, color=FAINT, fontSize=12).encode(
        y="limit:Q", x=alt.value(0), text="text:N"
    )
    return [rule, text] if rows else []

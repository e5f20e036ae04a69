"""Builds the charts of resident memory and of savings with Altair; each is a Vega-Lite spec, as a
dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from hintfleet.units import GIB, MIB
from orchestrator.report.contents import Contents
from orchestrator.report.curves import Curve, Mark
from orchestrator.report.style import FAINT, WIDTH, VegaLite, arm_colours, chart, styled, title

_HEIGHT = 360
_LABEL_PX = 17  # the distance from one line of text to the next
# The estimated width of an average character at font size 11. Labels are placed before they are
# rendered, so their width cannot be measured.
_CHARACTER_PX = 6.0
# Keeps the highest line off the upper edge of the plot.
_HEADROOM = 1.04


def resident_chart(contents: Contents) -> VegaLite:
    """Return the chart of resident memory over time.

    Each arm has a line (the mean of its trials), a band (from the lowest to the highest trial)
    and its name. A vertical rule marks the start of each phase, except the last: the read-back, or
    the end of a block.
    """
    top = max(float(c.high_bytes.max()) for c in contents.curves)
    unit_bytes, unit = (GIB, "GiB") if top >= 2 * GIB else (MIB, "MiB")
    end_s = contents.marks[-1].at_s
    x = alt.X(
        "at_s:Q",
        title="seconds since the workload began",
        scale=alt.Scale(domain=[0, end_s], nice=False),
        axis=alt.Axis(tickCount=8),
    )
    layers = [
        *_phases(contents.marks, end_s, x),
        *_lines(contents, x, top * _HEADROOM / unit_bytes, unit_bytes, unit),
        _names(contents, unit_bytes, end_s),
    ]
    return styled(
        alt.layer(*layers).properties(
            width=WIDTH,
            height=_height(contents),
            title=title(
                contents,
                "host memory under each arm",
                "Lines: mean of all trials; bands: lowest to highest trial; "
                "saved: difference of the means over time.",
            ),
        ),
        "Resident memory on the hosts over time, a line for each arm; figures are in the table.",
    )


def _lines(
    contents: Contents, x: alt.X, top: float, unit_bytes: int, unit: str
) -> tuple[alt.Chart, alt.Chart]:
    """Return two charts with all arms in each: their bands, and their mean lines."""
    y_scale = alt.Scale(domain=[0, top], nice=False)
    y = alt.Y(
        "mean:Q",
        title=f"resident on the hosts, {unit}",
        scale=y_scale,
        axis=alt.Axis(tickCount=6),
    )
    points = chart(_points(contents.curves, unit_bytes)).encode(
        x=x, color=alt.Color("arm:N", scale=arm_colours(contents), legend=None)
    )
    band = points.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q")
    line = points.mark_line(strokeWidth=2.5, strokeJoin="round").encode(
        y=y,
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("at_s:Q", title="after, s", format=".1f"),
            alt.Tooltip("mean:Q", title=f"mean, {unit}", format=".1f"),
        ],
    )
    return band, line


def savings_chart(contents: Contents) -> VegaLite | None:
    """Return the chart of the arms' savings with their 95 % intervals.

    Arms without savings are left out. None if no arm has savings.
    """
    values = [
        {
            "arm": row.arm,
            "saved": row.saved_bytes.mean / MIB,
            "low": row.saved_bytes.low / MIB,
            "high": row.saved_bytes.high / MIB,
        }
        for row in contents.rows
        if row.saved_bytes
    ]
    if not values:
        return None
    base = chart(values).encode(
        y=alt.Y("arm:N", title=None, sort=[str(value["arm"]) for value in values]),
        color=alt.Color("arm:N", scale=arm_colours(contents), legend=None),
    )
    title = "saved, MiB of mean resident memory (95 % interval)"
    interval = base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    mean = base.mark_point(filled=True, size=90, opacity=1).encode(
        x="saved:Q",
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("saved:Q", format=".1f"),
            alt.Tooltip("low:Q", format=".1f"),
            alt.Tooltip("high:Q", format=".1f"),
        ],
    )
    zero = chart([{"x": 0}]).mark_rule(color=FAINT, strokeDash=[2, 2]).encode(x="x:Q")
    return styled(
        alt.layer(zero, interval, mean).properties(width=WIDTH, height=alt.Step(28)),
        "Memory saved by each arm, with 95 % intervals; its figures are in the table.",
    )


def _points(curves: Sequence[Curve], unit_bytes: int) -> list[dict[str, Any]]:
    return [
        {"arm": c.arm, "at_s": round(at, 3), "mean": mean, "low": low, "high": high}
        for c in curves
        for at, mean, low, high in zip(
            c.at_s.tolist(),
            *(
                np.round(part / unit_bytes, 4).tolist()
                for part in (c.mean_bytes, c.low_bytes, c.high_bytes)
            ),
            strict=True,
        )
    ]


def _phases(marks: Sequence[Mark], end_s: float, x: alt.X) -> list[alt.Chart]:
    """Return a vertical rule at the start of each phase, and each phase's title above its rule.

    The last mark, the read-back or the end of a block, has neither.
    """
    placed = marks[:-1]
    rows = _rows([(mark.at_s / end_s * WIDTH, len(mark.title)) for mark in placed])
    values = [{"at_s": mark.at_s, "title": mark.title} for mark in placed]
    rules = chart(values).mark_rule(color=FAINT, strokeDash=[3, 3], opacity=0.6)
    texts = [
        chart([value])
        .mark_text(align="left", dy=-8 - row * _LABEL_PX, color=FAINT, fontSize=11, clip=False)
        .encode(x=x, y=alt.value(0), text="title:N")
        for value, row in zip(values, rows, strict=True)
    ]
    return [rules.encode(x=x), *texts]


def _rows(labels: Sequence[tuple[float, int]]) -> list[int]:
    """Place labels in rows, so that no label overlaps the previous label of the same row.

    :param labels: the left edge in pixels and the number of characters of each label, from left
        to right.
    :returns: the row of each label, counted from 0.
    """
    ends: list[float] = []
    rows = []
    for start_px, length in labels:
        row = next((i for i, end in enumerate(ends) if end <= start_px), len(ends))
        ends[row : row + 1] = [start_px + length * _CHARACTER_PX + 8]
        rows.append(row)
    return rows


def _names(contents: Contents, unit_bytes: int, end_s: float) -> alt.Chart:
    """Return a layer of labels: each arm's name and savings, to the right of its line."""
    saved = {row.arm: row.saved_bytes for row in contents.rows}
    top = max(float(c.high_bytes.max()) for c in contents.curves) * _HEADROOM
    ends = {c.arm: float(c.mean_bytes[-1]) for c in contents.curves}
    heights = _spread(ends, _LABEL_PX / _height(contents) * top, top)
    values = [
        {"arm": arm, "at_s": end_s, "y": height / unit_bytes, "text": _name(arm, saved.get(arm))}
        for arm, height in heights.items()
    ]
    names: alt.Chart = (
        chart(values)
        .mark_text(align="left", dx=8, fontSize=12.5, fontWeight="bold", clip=False)
        .encode(
            x="at_s:Q",
            y="y:Q",
            text="text:N",
            color=alt.Color("arm:N", scale=arm_colours(contents), legend=None),
        )
    )
    return names


def _name(arm: str, saved: Any) -> str:
    if saved is None:
        return arm
    return f"{arm}: {saved.mean / MIB:.0f} MiB saved"


def _height(contents: Contents) -> int:
    """Return the height of the plot in pixels: at least 360, and one line of text for each arm."""
    return max(_HEIGHT, len(contents.curves) * _LABEL_PX)


def _spread(wanted: dict[str, float], distance: float, highest: float) -> dict[str, float]:
    """Return the wanted heights, moved apart until any two differ by at least `distance`.

    All results are at most `highest`, and at least 0, except if so many heights do not fit between
    0 and `highest`: then some are below 0.
    """
    placed: dict[str, float] = {}
    lowest = 0.0
    for arm, height in sorted(wanted.items(), key=lambda item: item[1]):
        placed[arm] = max(height, lowest)
        lowest = placed[arm] + distance
    for arm in reversed(placed):
        placed[arm] = min(placed[arm], highest)
        highest = placed[arm] - distance
    return placed

"""What all charts of a report have in common: size, colours, fonts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from orchestrator.report.contents import Contents

VegaLite = dict[str, Any]

WIDTH = 760
FAINT = "#6e7781"
"""Grey that can be read on a white page and on a black one."""
_FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
# The control arm is grey. The first six colours of the other arms are those of Okabe and Ito,
# which colour-blind people can tell apart.
_CONTROL_COLOUR = "#8c959f"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#003f5c")


def _theme(ink: str, faint: str, axis: str, grid: str) -> VegaLite:
    return {
        "axis": {
            "labelColor": faint,
            "titleColor": ink,
            "gridColor": grid,
            "domainColor": axis,
            "tickColor": axis,
        },
        "title": {"color": ink, "subtitleColor": faint},
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12},
    }


LIGHT = _theme("#24292f", FAINT, "#d0d7de", "#eaeef2")
DARK = _theme("#e6edf3", "#9198a1", "#3d444d", "#262c36")


def chart(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """Return a chart of these rows, without marks yet."""
    return alt.Chart(alt.InlineData(values=list(rows)))


def arm_colours(contents: Contents) -> alt.Scale:
    """Return the colour of each arm, the same in all charts of a report."""
    arms = contents.arms
    others = [arm for arm in arms if arm != contents.run.control]
    colours = {arm: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(others)}
    return alt.Scale(domain=arms, range=[colours.get(arm, _CONTROL_COLOUR) for arm in arms])


def arm_lines(contents: Contents) -> alt.Color:
    """Return the colour of each arm in a chart of lines, with a legend above it."""
    return alt.Color(
        "arm:N",
        scale=arm_colours(contents),
        legend=alt.Legend(title=None, orient="top", symbolType="stroke"),
    )


def title(contents: Contents, shows: str, explained: str) -> alt.TitleParams:
    """Return the title of a run's chart.

    :param explained: what the marks mean; below the title, behind the size of the run.
    """
    run = contents.run
    return alt.TitleParams(
        f"{run.name}: {shows}",
        subtitle=f"{run.summary}. {explained}",
        anchor="start",
        frame="group",
        offset=14,
    )


def styled(made: Any, description: str) -> VegaLite:
    """Return a chart as a Vega-Lite spec.

    Its background is transparent, and the page sets the colours of its axes and titles, so that it
    fits a light page and a dark one (page.html).

    :param description: what a screen reader says instead of the chart.
    """
    padding = {"left": 8, "top": 12, "right": 16, "bottom": 8}
    spec: VegaLite = (
        made.configure(font=_FONT, background="transparent", padding=padding)
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=12, titleFontSize=12, titleFontWeight="normal", titlePadding=10
        )
        .configure_axisX(grid=False)
        .configure_title(fontSize=18, subtitleFontSize=12.5, subtitlePadding=6)
        .to_dict()
    )
    return spec | {"description": description}


def alone(spec: VegaLite) -> VegaLite:
    """Return a chart for a picture of its own: on white, in the light colours."""
    config = spec["config"]
    merged = {name: config.get(name, {}) | colours for name, colours in LIGHT.items()}
    return spec | {"config": config | merged | {"background": "white"}}

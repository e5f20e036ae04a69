"""Builds the report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

import vl_convert
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hintfleet import __version__
from orchestrator.report.charts import resident_chart, savings_chart
from orchestrator.report.contents import Contents
from orchestrator.report.fill_chart import fill_chart
from orchestrator.report.frontier_chart import frontier_chart
from orchestrator.report.loop_charts import allocation_charts
from orchestrator.report.parts_chart import parts_chart
from orchestrator.report.style import DARK, LIGHT, VegaLite
from orchestrator.view import tables
from orchestrator.view.capacity_table import capacity_table
from orchestrator.view.figures import first_line, when
from orchestrator.view.frontier_table import NOTE, frontier_table
from orchestrator.view.loop_tables import LOOP_NOTE, loop_tables
from orchestrator.view.node_tables import places_table
from orchestrator.view.precision import outcome

_FITTED = """How many guests had done their workload when the host ran out of memory, all hosts
together. More: than under the control, over pairs of trials with the same seeds; in brackets the
95 % interval."""
_SAVED = """Saved: mean resident memory under the control minus that under the arm, over pairs of
trials with the same seeds, all hosts together; in brackets the 95 % interval."""
_SPENT = """Slower, more: compared with the control, over the same pairs. Host CPU is the CPU time
of the guests' processes and the host agents together; it includes guest CPU."""


_PARTS = """What the guests' agents said of their memory, while the workload ran. Held back: free,
and likely to be used again soon. In flight: being hinted. Waiting: free, not hinted yet. In pieces:
free, but in no whole chunk. docs/memory.md"""


def page(contents: Contents) -> str:
    """Return the HTML page: the answer first, then tables, plots, the spec and the machine."""
    run = contents.run
    main_chart = _main_name(contents)
    charts = {main_chart: main_plot(contents)}
    if (savings := savings_chart(contents)) is not None:
        charts["savings"] = savings
    if (parts := parts_chart(contents)) is not None:
        charts["parts"] = parts
    allocations = allocation_charts(contents)
    charts |= {_plot_of(contents, title): plot for title, plot in allocations.items()}
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{run.name}: run {run.run_id}"),
        name=escape(run.name),
        summary=escape(run.summary),
        run_id=run.run_id,
        when=when(run.started_unix_us),
        state=escape(run.state),
        answer=_paragraph("answer", contents.answer),
        reasons="".join(
            _paragraph("undecided", f"undecided: {first_line(r)}") for r in contents.reasons
        )
        + "".join(
            _paragraph("undecided", line)
            for line in dict.fromkeys(map(tables.left_out_line, contents.rows))
        )
        + _paragraph("faint", outcome(run, contents.rows)),
        plot=main_chart,
        figures=_fitted(contents) if contents.capacities else _saved(contents),
        more="" if contents.capacities else _returned_and_spent(contents),
        spec=escape(run.annotated_spec),
        nodes=_html_table(places_table(run, contents.trials)),
        environment=_html_table(_environment(run.environment)),
        version=__version__,
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        # `<` is escaped: `</script>` in the data would end the script element, because an HTML
        # parser looks for that text inside JavaScript strings, too.
        charts=json.dumps(charts).replace("<", "\\u003c"),
        themes=json.dumps({"light": LIGHT, "dark": DARK}),
    )


def _main_name(contents: Contents) -> str:
    if contents.frontier:
        return "frontier"
    return "fills" if contents.capacities else "resident"


def main_plot(contents: Contents) -> VegaLite:
    """Return the chart that answers the question of the run."""
    if contents.frontier:
        return frontier_chart(contents)
    return fill_chart(contents) if contents.capacities else resident_chart(contents)


def _fitted(contents: Contents) -> str:
    if contents.frontier:
        table = _html_table(frontier_table(contents.frontier))
        return _section("How often hosts ran out of memory", table, note=NOTE)
    table = _html_table(capacity_table(contents.capacities))
    return _section("How many guests fit", table, note=_FITTED)


def _saved(contents: Contents) -> str:
    plot = '<div class="wide" id="savings"></div>'
    table = _html_table(tables.memory(contents.rows))
    return _section("What each arm used and saved", table, plot, note=_SAVED)


def _returned_and_spent(contents: Contents) -> str:
    returned = _html_table(tables.returned_memory(contents.rows))
    spent = _html_table(tables.cost_table(contents.costs))
    consists = _section("What was resident", '<div class="wide" id="parts"></div>', note=_PARTS)
    return "".join(
        (
            consists if contents.parts else "",
            _section("What came back, and whether the workload kept its data", returned),
            _section("What it cost", spent, note=_SPENT),
            _loops(contents),
        )
    )


def _section(title: str, *blocks: str, note: str = "") -> str:
    body = "".join(blocks) + _paragraph("faint", " ".join(note.split()))
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _paragraph(kind: str, text: str) -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def _loops(contents: Contents) -> str:
    """Return the section with what the loops of the workload measured; empty without figures."""
    if not contents.loops:
        return ""
    measured = []
    for one in loop_tables(contents.loops):
        title = str(one.title)
        measured += [f"<h3>{escape(title)}</h3>", _html_table(one)]
        if title in contents.allocations:
            measured.append(f'<div class="wide" id="{_plot_of(contents, title)}"></div>')
    return _section("What the loops measured", *measured, note=LOOP_NOTE.plain)


def _plot_of(contents: Contents, title: str) -> str:
    """Return the id of the plot of a loop's allocations."""
    return f"allocations-{list(contents.allocations).index(title)}"


def _environment(environment: Mapping[str, str]) -> Table:
    shown = tables.table(("what", "found"))
    for name, value in environment.items():
        # Text, not str: Rich would read brackets in a str as markup.
        shown.add_row(name, Text(value))
    return shown


def _html_table(table: Table) -> str:
    """Return a table that was made for the terminal as HTML, in a box that scrolls by keyboard."""
    sides = ["" if column.justify == "right" else ' class="left"' for column in table.columns]
    header = _cells("th", [column.header for column in table.columns], sides, ' scope="col"')
    columns = [list(column.cells) for column in table.columns]
    rows = [_cells("td", row, sides) for row in zip(*columns, strict=True)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><tr>{header}</tr>{body}</table></div>'


def _cells(tag: str, cells: Sequence[RenderableType], sides: Sequence[str], more: str = "") -> str:
    return "".join(
        f"<{tag}{side}{more}>{escape(_plain(cell)).replace(chr(10), '<br>')}</{tag}>"
        for cell, side in zip(cells, sides, strict=True)
    )


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain

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
from orchestrator.view import tables
from orchestrator.view.figures import first_line, when


def page(contents: Contents) -> str:
    """Return the HTML page."""
    run = contents.run
    charts = {"resident": resident_chart(contents)}
    if (savings := savings_chart(contents)) is not None:
        charts["savings"] = savings
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{run.name}: run {run.run_id}"),
        name=escape(run.name),
        summary=escape(run.summary),
        run_id=run.run_id,
        when=when(run.started_unix_us),
        state=escape(run.state),
        reasons=_reasons(contents),
        memory=_html_table(tables.memory(contents.rows)),
        returned=_html_table(tables.returned_memory(contents.rows)),
        spent=_html_table(tables.cost_table(contents.costs)),
        spec=escape(run.annotated_spec),
        environment=_html_table(_environment(run.environment)),
        version=__version__,
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        # `<` is escaped: `</script>` in the data would end the script element, because an HTML
        # parser looks for that text inside JavaScript strings, too.
        charts=json.dumps(charts).replace("<", "\\u003c"),
    )


def _reasons(contents: Contents) -> str:
    reasons = dict.fromkeys(row.undecided for row in contents.rows if row.undecided)
    return "".join(f"<p>undecided: {escape(first_line(reason))}</p>" for reason in reasons)


def _environment(environment: Mapping[str, str]) -> Table:
    shown = tables.table(("what", "found"))
    for name, value in environment.items():
        # Text, not str: Rich would read brackets in a str as markup.
        shown.add_row(name, Text(value))
    return shown


def _html_table(table: Table) -> str:
    """Return a table that was made for the terminal as HTML."""
    sides = ["" if column.justify == "right" else ' class="left"' for column in table.columns]
    header = _cells("th", [column.header for column in table.columns], sides)
    columns = [list(column.cells) for column in table.columns]
    rows = [_cells("td", row, sides) for row in zip(*columns, strict=True)]
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cells(tag: str, cells: Sequence[RenderableType], sides: Sequence[str]) -> str:
    return "".join(
        f"<{tag}{side}>{escape(_plain(cell)).replace(chr(10), '<br>')}</{tag}>"
        for cell, side in zip(cells, sides, strict=True)
    )


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain

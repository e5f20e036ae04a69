"""The command `hintfleet report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.options import data_dir_option, data_dir_or_default

if TYPE_CHECKING:
    from orchestrator.report.contents import Contents

_EPILOG = """\b
Examples:
  hintfleet report                             the newest run, as hintfleet-ID.html
  hintfleet report 4ynra -o quickstart.html
  hintfleet report latest --plot quickstart.png
"""
_PIXELS_PER_POINT = 2


@click.command(epilog=_EPILOG, short_help="Make a report of one run: an HTML file or a picture.")
@click.argument("run", default="latest")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The HTML file to write.  [default: hintfleet-ID.html in the current folder]",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write only the main plot, to a file that ends in .png or .svg.",
)
@data_dir_option
def report(run: str, output: Path | None, plot: Path | None, data_dir: Path | None) -> None:
    """Make a report of one run as one HTML file that needs no network.

    It shows memory over time under each arm, what each arm saved and cost (or how many guests
    it could run), the spec, and the machine. RUN is an id, a unique part of an id, or
    `latest`. Prints the name of the file. Needs the extra `report` (pip install
    'hintfleet[report]').
    """
    from orchestrator.results.store.reader import Store

    _check(output, plot)
    with Store(data_dir_or_default(data_dir)) as store:
        found = store.find_run(run)
        from orchestrator.report.contents import read_contents

        contents = read_contents(store, found)
    path = plot or output or Path(f"hintfleet-{found.run_id}.html")
    try:
        if plot is None:
            _write_page(contents, path)
        else:
            _write_plot(contents, path)
    except OSError as error:
        from hintfleet.errors import Refused

        raise Refused(f"cannot write {path}: {error.strerror or error}") from error
    click.echo(path)


def _check(output: Path | None, plot: Path | None) -> None:
    if output is not None and plot is not None:
        raise click.UsageError("give either --output or --plot")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise click.UsageError(f"--plot {plot}: the name must end in .png or .svg")
    from importlib.util import find_spec

    from hintfleet.errors import Refused

    # altair and vl_convert are looked up, not imported: that would take long.
    missing = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if missing:
        raise Refused(
            f"a report needs {' and '.join(missing)}",
            hint="pip install 'hintfleet[report]', or in a clone pip install -e '.[report]'",
        )


def _write_page(contents: Contents, path: Path) -> None:
    from orchestrator.report.page import page

    path.write_text(page(contents), encoding="utf-8")


def _write_plot(contents: Contents, path: Path) -> None:
    import vl_convert

    from orchestrator.report.page import main_plot
    from orchestrator.report.style import alone

    chart = alone(main_plot(contents))
    if path.suffix == ".svg":
        path.write_text(vl_convert.vegalite_to_svg(chart), encoding="utf-8")
    else:
        path.write_bytes(vl_convert.vegalite_to_png(chart, scale=_PIXELS_PER_POINT))

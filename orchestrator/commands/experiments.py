"""The command `hintfleet experiments`."""

from __future__ import annotations

import click

from orchestrator.commands.options import output_option


@click.command(short_help="List the experiments that ship with hintfleet.")
@click.argument("name", required=False)
@output_option
def experiments(name: str | None, output_format: str) -> None:
    """List the experiments that ship with hintfleet, or print the spec of one.

    \b
    Examples:
      hintfleet experiments
      hintfleet experiments quickstart > my.yaml
    """
    from hintfleet.errors import InvalidInput
    from orchestrator.commands.output import emit
    from orchestrator.spec import catalogue
    from orchestrator.spec import file as spec_file
    from orchestrator.spec.model import describe
    from orchestrator.view.tables import table

    if name is None:
        specs = [spec_file.load(known).spec for known in catalogue.names()]
        listed = [{"name": s.name, "what": s.description, "size": describe(s)} for s in specs]
        shown = table(("experiment", "what it shows"))
        for row in listed:
            shown.add_row(row["name"], f"{row['what']}\n{row['size']}")
        emit(listed, output_format, lambda: shown)
    elif name in catalogue.names():
        click.echo(catalogue.text(name), nl=False)
    else:
        raise InvalidInput(
            f"the catalogue has no experiment {name!r}",
            hint=f"it has {', '.join(catalogue.names())}",
        )

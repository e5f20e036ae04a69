"""`hintfleet doctor`"""

from __future__ import annotations

import click

from orchestrator.commands.options import libvirt_uri_option, output_option


@click.command(short_help="Say what this machine can run, and what is missing.")
@libvirt_uri_option
@output_option
def doctor(libvirt_uri: str, output_format: str) -> int:
    """Say what this machine can run, and what to install for the rest.

    Exit code 0 if it can run embedded guests, 1 if not.
    """
    from dataclasses import asdict

    from orchestrator.doctor import can_run, examine
    from orchestrator.output import emit
    from orchestrator.view.tables import findings

    found = examine(libvirt_uri)
    runs = {driver: can_run(found, driver) for driver in ("embedded", "libvirt")}
    data = {"can_run": runs, "findings": [asdict(finding) for finding in found]}
    emit(data, output_format, lambda: findings(found, runs))
    return 0 if runs["embedded"] else 1

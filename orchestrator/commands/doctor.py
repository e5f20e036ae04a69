"""The command `hintfleet doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from hintfleet.settings import Driver
from orchestrator.commands.options import (
    data_dir_option,
    data_dir_or_default,
    libvirt_uri_option,
    output_option,
)

_EPILOG = """\b
Examples:
  hintfleet doctor
  hintfleet doctor --leaks       list leftovers of crashes; exit code 1 if there are any
  hintfleet doctor --clean       remove them; exit code 1 if one could not be removed

\b
The exit code is also 1 if something could not be checked, for example because libvirt does
not answer.
"""


@click.command(
    epilog=_EPILOG, short_help="Check what this machine can run, and find leftovers of crashes."
)
@click.option("--leaks", is_flag=True, help="List what crashes left on this machine.")
@click.option("--clean", is_flag=True, help="Remove what --leaks lists, without asking.")
@libvirt_uri_option
@data_dir_option
@output_option
def doctor(
    leaks: bool, clean: bool, libvirt_uri: str, data_dir: Path | None, output_format: str
) -> int:
    """Check what this machine can run, and say what to install for the rest.

    The exit code is 0 if it can run embedded guests, else 1.

    With --leaks or --clean, look for leftovers of crashes on this machine: domains and
    guests without a host agent, host agents and Ray processes without a run, their files
    and memory, and unfinished files in the store. Things that a living process owns, or
    that may not be hintfleet's, are never listed. Neither are guests that may outlive their
    host agent (hintfleet-host --state): those end by themselves.
    """
    from orchestrator.commands.output import emit
    from orchestrator.doctor import can_run, examine
    from orchestrator.view.tables import findings

    if leaks or clean:
        return _leaks(data_dir_or_default(data_dir), libvirt_uri, clean, output_format)
    found = examine(libvirt_uri)
    runs = {driver: can_run(found, driver) for driver in Driver}
    data = {
        "can_run": {driver.value: ok for driver, ok in runs.items()},
        "findings": [finding.as_json() for finding in found],
    }
    emit(data, output_format, lambda: findings(found, runs))
    return 0 if runs[Driver.EMBEDDED] else 1


def _leaks(data_dir: Path, libvirt_uri: str, clean: bool, output_format: str) -> int:
    from orchestrator.commands.output import emit
    from orchestrator.leaks import look_for_leaks
    from orchestrator.view.leak_table import leak_table

    found = look_for_leaks(data_dir, libvirt_uri, clean)
    data = {
        "leaks": [leak.as_json() for leak in found.leaks],
        "not_looked_at": found.not_looked_at,
    }
    all_looked_at = not found.not_looked_at
    emit(data, output_format, lambda: leak_table(found.leaks, all_looked_at=all_looked_at))
    for unseen in found.not_looked_at:
        click.echo(f"not checked: {unseen}", err=True)
    if found.leaks and not clean:
        click.echo("to remove them: hintfleet doctor --clean", err=True)
    return 0 if all_looked_at and all(leak.removed for leak in found.leaks) else 1

"""The command `hintfleet domains`."""

from __future__ import annotations

import click

from orchestrator.commands.options import output_option, tls_option, tls_or_none

_EPILOG = """\b
Examples:
  hintfleet domains
  hintfleet domains --host h1.example.org:7070 --tls ~/operator-alice -o json
"""


def _this_machine() -> str:
    from hintfleet.net.addresses import default_control_address

    return default_control_address()


@click.command(epilog=_EPILOG)
@click.option(
    "--host",
    "address",
    default=_this_machine,
    show_default="the host agent of this machine",
    metavar="ADDR",
    help="A running host agent: unix:PATH, or HOST:PORT; off loopback, --tls is required.",
)
@tls_option
@output_option
def domains(address: str, tls_folder: str, output_format: str) -> int:
    """Show for each libvirt domain of a host whether its free memory could be hinted, and
    what to change if not. Changes nothing."""
    import asyncio

    from orchestrator.commands.output import emit
    from orchestrator.trial.host_client import list_domains
    from orchestrator.view.domain_table import domain_table

    found = asyncio.run(list_domains(address, tls_or_none(tls_folder)))
    data = [
        {
            "name": domain.name,
            "uuid": domain.uuid,
            "running": domain.running,
            "memory_bytes": domain.memory_bytes,
            "obstacles": [{"what": one.what, "change": one.change} for one in domain.obstacles],
        }
        for domain in found
    ]
    emit(data, output_format, lambda: domain_table(found))
    return 0

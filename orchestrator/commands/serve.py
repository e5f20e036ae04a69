"""`hintfleet serve`"""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.options import data_dir_option, data_dir_or_default

_EPILOG = """\b
Examples:
  hintfleet serve
  hintfleet savings --server 127.0.0.1:50061
  grpcurl -plaintext -d '{"by": "ARM"}' 127.0.0.1:50061 hintfleet.v1.FleetService/QuerySavings
"""


@click.command(epilog=_EPILOG, short_help="Serve runs and savings over gRPC.")
@click.option(
    "--listen",
    default="127.0.0.1:50061",
    show_default=True,
    metavar="ADDR",
    help="HOST:PORT on loopback (port 0 picks one), or unix:PATH.",
)
@data_dir_option
def serve(listen: str, data_dir: Path | None) -> None:
    """Serve runs and their savings over gRPC, with health and reflection, until SIGTERM."""
    from orchestrator import fleet_service

    def ready(address: str) -> None:
        click.echo(f"serving on {address}", err=True)

    fleet_service.serve(listen, data_dir_or_default(data_dir), ready)

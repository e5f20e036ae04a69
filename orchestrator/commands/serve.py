"""The command `hintfleet serve`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.options import (
    data_dir_option,
    data_dir_or_default,
    tls_option,
    tls_or_none,
)

_EPILOG = """\b
Examples:
  hintfleet serve
  hintfleet serve --listen 192.0.2.7:50061 --tls ~/host-lab
  hintfleet savings --server 127.0.0.1:50061
  grpcurl -plaintext -d '{"by": "ARM"}' 127.0.0.1:50061 hintfleet.v1.FleetService/QuerySavings
"""


@click.command(epilog=_EPILOG, short_help="Serve runs and savings over gRPC.")
@click.option(
    "--listen",
    default="127.0.0.1:50061",
    show_default=True,
    metavar="ADDR",
    help="HOST:PORT or unix:PATH. Port 0 picks a free port. Off loopback, --tls is required.",
)
@tls_option
@data_dir_option
def serve(listen: str, tls_folder: str, data_dir: Path | None) -> None:
    """Serve runs and their savings over gRPC until SIGTERM or Ctrl-C.

    The server also answers health checks and reflection.
    """
    from orchestrator.service import server

    def ready(address: str) -> None:
        click.echo(f"serving on {address}", err=True)

    # `server=True` refuses a certificate for clients here; else every client would refuse it later.
    tls = tls_or_none(tls_folder, server=True)
    server.serve(listen, data_dir_or_default(data_dir), ready, tls)

"""`hintfleet pki`: certificates for a fleet that spans machines."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.options import output_option

_EPILOG = """\b
Examples:
  hintfleet pki init
  hintfleet pki issue host h1 --at h1.example.org --at 192.0.2.7
  hintfleet pki issue operator alice
  hintfleet pki issue guest 6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10
  hintfleet pki show

\b
`issue` prints the path of a folder with ca.pem, cert.pem and key.pem. Move that folder to
the machine that uses it:
  hintfleet-host --listen 192.0.2.7:7070 --tls FOLDER              a host's
  hintfleet run my.yaml --host h1.example.org:7070 --tls FOLDER    an operator's

\b
Exit codes: 0 done; 1 refused, because the files exist already (`show`: a certificate is
not valid); 2 wrong input (a bad name, a file that cannot be read).
"""

_DAYS = click.IntRange(1, 36_500)

folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The authority's folder.  [default: hintfleet/pki in the XDG config folder]",
)


@click.group(epilog=_EPILOG, short_help="Make and show certificates for TLS between machines.")
def pki() -> None:
    """Make and show certificates.

    Connections between machines use TLS (loopback and unix sockets do not need it). Both
    sides authenticate with a certificate that names their role: host, guest or operator.
    """


@pki.command()
@click.option("--name", default="hintfleet", show_default=True, help="The authority's name.")
@click.option("--days", type=_DAYS, default=3650, show_default=True, help="Days it is valid.")
@folder_option
def init(name: str, days: int, folder: Path | None) -> None:
    """Make a certificate authority. Keep its folder private, on one machine."""
    from orchestrator.pki import Authority

    where = _folder_or_default(folder)
    Authority.init(where, name, days)
    click.echo(where)


@pki.command()
@click.argument("role", type=click.Choice(("host", "guest", "operator")))
@click.argument("name")
@click.option(
    "--at",
    "hosts",
    multiple=True,
    metavar="NAME|IP",
    help="A DNS name or IP address of the host; may be repeated.  [default: NAME]",
)
@click.option("--days", type=_DAYS, default=397, show_default=True, help="Days it is valid.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder to create.  [default: issued/ROLE-NAME in the authority's folder]",
)
@folder_option
def issue(
    role: str,
    name: str,
    hosts: tuple[str, ...],
    days: int,
    out: Path | None,
    folder: Path | None,
) -> None:
    """Make a certificate and its key in a new folder. A guest's NAME is its UUID."""
    from hintfleet.net.tls import Role
    from orchestrator.pki import Authority

    if hosts and role != Role.HOST.value:
        raise click.UsageError("--at is for role host only")
    if role == Role.HOST.value:
        hosts = hosts or (name,)
    authority = Authority(_folder_or_default(folder))
    click.echo(authority.issue(Role(role), name, hosts, days, out))


@pki.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@output_option
def show(path: Path | None, output_format: str) -> int:
    """Show the subject, the last day and the fingerprint of certificates.

    PATH is a certificate, a folder with one, or an authority's folder (the default). For an
    authority, its own certificate and those in its folder `issued` are shown. The exit code is
    1 unless all that are shown are valid.
    """
    from dataclasses import asdict

    from orchestrator.commands.output import emit
    from orchestrator.pki import read_certificates
    from orchestrator.view.tables import certificates

    found = list(read_certificates(path or _folder_or_default(None)))
    emit([asdict(one) for one in found], output_format, lambda: certificates(found))
    return int(any(one.state != "valid" for one in found))


def _folder_or_default(chosen: Path | None) -> Path:
    if chosen is not None:
        return chosen
    from platformdirs import user_config_path

    return user_config_path("hintfleet", appauthor=False) / "pki"

"""Options that several commands share, and checks of what they were given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hintfleet.net.tls import Tls

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results are stored.  [default: hintfleet in the XDG data folder]",
)

output_option = click.option(
    "-o",
    "--output",
    "output_format",
    type=click.Choice(("table", "json", "yaml")),
    default="table",
    show_default=True,
    help="How to print the result.",
)

libvirt_uri_option = click.option(
    "--libvirt-uri",
    envvar="LIBVIRT_DEFAULT_URI",
    default="",
    metavar="URI",
    help="The libvirt connection that creates guests.  [default: the host agent's]",
)


tls_option = click.option(
    "--tls",
    "tls_folder",
    envvar="HINTFLEET_TLS",
    default="",
    metavar="FOLDER",
    help="Speak TLS on TCP, with the certificate in this folder (see `hintfleet pki`).  "
    "[env: HINTFLEET_TLS]",
)

address_option = click.option(
    "--address",
    metavar="ADDR",
    help="The Ray cluster: HOST:PORT of its GCS, or `auto` for that of this machine; `local`: "
    "none.  [env: RAY_ADDRESS]",
)


def data_dir_or_default(chosen: Path | None) -> Path:
    """Return the folder with the results: `chosen`, or hintfleet in the XDG data folder."""
    if chosen is not None:
        return chosen
    from platformdirs import user_data_path

    return user_data_path("hintfleet", appauthor=False)


def tls_or_none(folder: str, *, server: bool = False) -> Tls | None:
    """Read the TLS folder; return None if `folder` is empty.

    :param server: whether the certificate must be one for a server; else for a client.
    :raises InvalidInput: the folder cannot be used.
    """
    if not folder:
        return None
    from hintfleet.net.tls import Tls

    return Tls.read(folder, server=server)


def check_names() -> None:
    """Check that the command line and the current folder can be given to Ray.

    :raises Refused: one of them is not UTF-8, or the folder was removed.
    """
    from hintfleet.errors import Refused

    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise Refused("the current folder was removed", hint="change to another one (cd)") from None
    # Ray sends these names to its GCS as text: `connect` in ray/_private/worker.py (2.60).
    for name in (*sys.argv, folder):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"{name}: Ray cannot run with a name that is not UTF-8",
                hint="use a link with another name (ln -s), and run from another folder",
            ) from error

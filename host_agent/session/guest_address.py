"""Where guests find the host agent, and find it again after a restart."""

from __future__ import annotations

import contextlib
import random
import secrets
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, socket

from grpc import aio

from hintfleet.errors import Refused
from hintfleet.net.tls import Tls, listen


@dataclass(frozen=True, kw_only=True)
class GuestAddress:
    """Addresses that guests are told.

    :ivar socket: `unix-abstract:NAME`, for processes of this host.
    :ivar address: `HOST:PORT`, for virtual machines.
    """

    socket: str
    address: str


def open_address(server: aio.Server, address: str, tls: Tls | None) -> GuestAddress:
    """Have the guests' server listen at `address` and at a socket of its own.

    :raises Refused, InvalidInput: as hintfleet.net.tls.listen.
    """
    # Abstract: it has no file, so nothing is left behind however this process ends.
    # Anybody on this host can reach it; what counts is a guest's token.
    name = f"unix-abstract:hintfleet-{secrets.token_hex(16)}"
    return GuestAddress(socket=listen(server, name, None), address=listen(server, address, tls))


def open_lasting_address(
    server: aio.Server, address: str, tls: Tls | None, earlier: GuestAddress | None
) -> GuestAddress:
    """The same, at the `earlier` door if there was one; port 0 stands for any.

    :raises Refused, InvalidInput: as hintfleet.net.tls.listen.
    """
    host, _, port = address.rpartition(":")
    if earlier is None:
        return open_address(
            server, f"{host}:{_lasting_port(host)}" if port == "0" else address, tls
        )
    if port == "0":
        address = f"{host}:{earlier.address.rpartition(':')[2]}"
    try:
        return GuestAddress(
            socket=listen(server, earlier.socket, None), address=listen(server, address, tls)
        )
    except Refused as error:
        raise Refused(
            error.message,
            hint="guests that outlived a host agent look for this one there: free it (ss -ltnp)",
        ) from error


def _lasting_port(host: str) -> int:
    """A free port that nobody is given by chance while no host agent listens at it: below
    those of outgoing connections, of which guests that look for us make many.

    :raises Refused: there is none.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    family = AF_INET6 if ":" in host else AF_INET
    for port in random.sample(range(low // 2, low), 50):
        with socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host.strip("[]"), port))
            return port
    raise Refused(
        f"no port below {low} is free for guests to find the next host agent at",
        hint="give one with --guest-listen HOST:PORT",
    )

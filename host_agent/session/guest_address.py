"""The addresses at which guests connect to the host agent. With --state, the next host agent
listens at the same abstract socket, and at the same HOST:PORT unless its --guest-listen names
another host or port."""

from __future__ import annotations

import contextlib
import random
import secrets
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, socket

from grpc import aio

from hintfleet.errors import Refused
from hintfleet.net.addresses import ABSTRACT
from hintfleet.net.tls import Tls, bind, listen


@dataclass(frozen=True, kw_only=True)
class GuestAddress:
    """The addresses at which one host agent listens for guests.

    :ivar socket: `unix-abstract:NAME`, for guests that are processes of this host.
    :ivar address: `HOST:PORT`, for guests that are virtual machines.
    """

    socket: str
    address: str


def open_address(server: aio.Server, address: str, tls: Tls | None) -> GuestAddress:
    """Let the guests' server listen at `address` and at a new abstract socket; return both.

    :raises Refused, InvalidInput: as hintfleet.net.tls.listen.
    """
    # An abstract socket (unix(7)) has no file, so none is left behind however this process ends.
    # Every process in this network namespace can connect to the socket; guests authenticate with
    # their tokens.
    name = f"{ABSTRACT}hintfleet-{secrets.token_hex(16)}"
    return GuestAddress(socket=bind(server, name, None), address=listen(server, address, tls))


def open_lasting_address(
    server: aio.Server, address: str, tls: Tls | None, earlier: GuestAddress | None
) -> GuestAddress:
    """Let the guests' server listen at addresses that the next host agent can use again; return
    them.

    :param address: HOST:PORT. Port 0 means the port of `earlier`, or without `earlier` a free port
        that the kernel gives to no outgoing connection (`_lasting_port`).
    :param earlier: where the host agent before this one listened. This one listens at the same
        abstract socket; None: there was none before, so the socket is new.
    :raises Refused, InvalidInput: as hintfleet.net.tls.listen; or no such port is free.
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
            socket=bind(server, earlier.socket, None), address=listen(server, address, tls)
        )
    except Refused as error:
        raise Refused(
            error.message,
            hint="guests that outlived a host agent connect to this address: stop the process"
            " that uses it (ss -ltnp shows it)",
        ) from error


def _lasting_port(host: str) -> int:
    """Return a free port below those that the kernel gives to outgoing connections.

    :raises Refused: none of 50 random ports is free.
    """
    # Between two host agents nobody listens at the port. The kernel may give a port of
    # ip_local_port_range to any outgoing connection, for example to one by which a guest tries to
    # reach the host agent.
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    family = AF_INET6 if ":" in host else AF_INET
    for port in random.sample(range(low // 2, low), 50):
        with socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host.strip("[]"), port))
            return port
    raise Refused(
        f"no free port below {low} was found for --guest-listen",
        hint="choose one with --guest-listen HOST:PORT",
    )

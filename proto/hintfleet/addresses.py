"""Addresses of gRPC servers, and which of them may be spoken to in plain text."""

from __future__ import annotations

import ipaddress
import re

from hintfleet.errors import InvalidInput

ENCRYPT_HINT = (
    "use unix:PATH or 127.0.0.1:PORT (or an SSH tunnel to it), or certificates: "
    "`hintfleet pki init`, then --tls FOLDER on both sides"
)


def is_unix(address: str) -> bool:
    """Whether it is a socket of this machine's kernel, which no network can reach."""
    return address.startswith(("unix:", "unix-abstract:"))


def address_problem(address: str) -> str:
    """Why this is no address; empty if it is one."""
    if is_unix(address):
        return "" if address.partition(":")[2] else f"{address!r} has no path after unix:"
    _, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        return f"{address!r} is no address: write HOST:PORT or unix:PATH"
    return ""


def plain_text_problem(address: str) -> str:
    """Why this address cannot be used without TLS; empty if it can."""
    problem = address_problem(address)
    if problem or is_unix(address) or _is_loopback(address.rpartition(":")[0].strip("[]")):
        return problem
    return f"{address!r} is not on this machine's loopback, and plain text stays on it"


def check_plain_text(address: str) -> str:
    """Return `address` if it is a unix socket or on loopback.

    :raises InvalidInput: otherwise; says why.
    """
    if problem := plain_text_problem(address):
        raise InvalidInput(problem, hint=ENCRYPT_HINT)
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

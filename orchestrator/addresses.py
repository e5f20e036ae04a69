"""Addresses of gRPC servers, and which of them may be spoken to in plain text."""

from __future__ import annotations

import ipaddress

from hintfleet.errors import InvalidInput


def plain_text_problem(address: str) -> str:
    """Why this address cannot be used without TLS; empty if it can."""
    if address.startswith("unix:"):
        return "" if len(address) > len("unix:") else f"{address!r} has no path after unix:"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        return f"{address!r} is no address: write HOST:PORT or unix:PATH"
    if _is_loopback(host.strip("[]")):
        return ""
    return f"{address!r} is not on this machine's loopback, and plain text stays on it"


def check_plain_text(address: str) -> str:
    """Return `address` if it is a unix socket or on loopback.

    :raises InvalidInput: otherwise; says why.
    """
    if problem := plain_text_problem(address):
        raise InvalidInput(problem, hint="use 127.0.0.1:PORT or unix:PATH (or an SSH tunnel to it)")
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

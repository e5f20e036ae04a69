"""Checks addresses of servers: whether they are valid, and whether they may be used without TLS.
Also converts them to gRPC's form, and returns the default address of the control API."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import quote

from hintfleet.errors import InvalidInput

ENCRYPT_HINT = (
    "use unix:PATH or 127.0.0.1:PORT (or an SSH tunnel to it), or certificates: "
    "`hintfleet pki init`, then --tls FOLDER on both sides"
)

SHARED_FOLDER = Path("/tmp")  # noqa: S108
"""Where every user may make folders; the default address of some users is in it."""

# sun_path of a unix socket has 108 bytes with its NUL (unix(7)).
_MOST_PATH_BYTES = 107


ABSTRACT = "unix-abstract:"
"""The start of the address of an abstract socket (unix(7)), which has a name, but no file."""


def is_unix(address: str) -> bool:
    """Return whether `address` is a unix socket, which no network can reach."""
    return address.startswith(("unix:", ABSTRACT))


def socket_path(address: str) -> Path | None:
    """Return the file of a unix socket; None if the address has no file."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def grpc_target(address: str) -> str:
    """Return `address` in gRPC's form, for listening and connecting."""
    if not is_unix(address):
        return address
    # gRPC parses the address as a URI (src/core/util/uri.cc): without quoting, `%41` in a path
    # would become `A`, and a client would drop what follows `?` or `#`.
    kind, _, name = address.partition(":")
    return f"{kind}:{quote(os.fsencode(name))}"


def address_problem(address: str) -> str:
    """Return why `address` is not valid; empty if it is valid."""
    if is_unix(address):
        path_bytes = len(os.fsencode(address.partition(":")[2]))
        if not path_bytes:
            return f"{address!r} has no path after unix:"
        if path_bytes > _MOST_PATH_BYTES:
            return (
                f"{address!r} is too long: its path has {path_bytes} bytes, and the kernel "
                f"allows {_MOST_PATH_BYTES} for a socket"
            )
        return ""
    _, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        return f"{address!r} is no address: write HOST:PORT or unix:PATH"
    return ""


def plain_text_problem(address: str) -> str:
    """Return why `address` is not valid or may not be used without TLS; empty if it may be."""
    problem = address_problem(address)
    if problem or is_local(address):
        return problem
    return f"{address!r} is not on this machine's loopback: plain text is allowed only there"


def is_local(address: str) -> bool:
    """Return whether a valid address is a unix socket or on loopback: only its machine can reach
    it."""
    return is_unix(address) or _is_loopback(address.rpartition(":")[0].strip("[]"))


def check_address(address: str) -> str:
    """Return `address` if it is valid.

    :raises InvalidInput: it is not valid; the message is that of `address_problem`.
    """
    if problem := address_problem(address):
        raise InvalidInput(problem)
    return address


def check_plain_text(address: str) -> str:
    """Return `address` if it may be used without TLS: a unix socket, or HOST:PORT on loopback.

    :raises InvalidInput: it is not valid, or is neither of these.
    """
    check_address(address)
    if problem := plain_text_problem(address):
        raise InvalidInput(problem, hint=ENCRYPT_HINT)
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def default_control_address() -> str:
    """Return the default address of the control API of a host agent that this user runs."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or (
        "/run" if os.geteuid() == 0 else f"{SHARED_FOLDER}/hintfleet-{os.geteuid()}"
    )
    return f"unix:{Path(runtime) / 'hintfleet' / 'host.sock'}"

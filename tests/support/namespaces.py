"""Network namespaces as machines: each has a loopback and an address of its own, and a bridge
connects them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_PREFIX = f"hf-{os.getpid()}-"  # with our process id: no other process uses this prefix
_SWITCH = f"{_PREFIX}switch"
"""The namespace of the bridge; so the machine's own interfaces and routes are left alone."""
NEEDS = "needs root and ip (iproute2)"


def are_possible() -> bool:
    """Return whether this user is root, and the program `ip` is installed."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A network namespace.

    :ivar prefix: words to put before a command that is to run in it.
    """

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", _PREFIX + self.name)

    def processes(self) -> list[int]:
        """Return the ids of all processes in the namespace."""
        listed = subprocess.run(
            ["ip", "netns", "pids", _PREFIX + self.name], capture_output=True, text=True, check=True
        )
        return [int(word) for word in listed.stdout.split()]


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Make a network of machines with these names, at 10.99.0.1 and so on, until the block ends."""
    with ExitStack() as stack:
        stack.enter_context(_namespace(_SWITCH))
        _ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "bridge", "up")
        made = []
        for i, name in enumerate(names):
            machine = Machine(name=name, address=f"10.99.0.{i + 1}")
            space, port = _PREFIX + name, f"port{i + 1}"
            stack.enter_context(_namespace(space))
            # Make each end of the link in its namespace, so that this machine gets no interface.
            _ip(
                *("-n", space, "link", "add", "eth0", "type", "veth"),
                *("peer", "name", port, "netns", _SWITCH),
            )
            _ip("-n", _SWITCH, "link", "set", port, "master", "bridge", "up")
            _ip("-n", space, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            # Ray takes the address from which the kernel would reach the internet: add a route.
            _ip("-n", space, "route", "add", "default", "via", "10.99.0.254")
            made.append(machine)
        yield made


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    _ip("netns", "add", name)
    try:
        yield
    finally:
        _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

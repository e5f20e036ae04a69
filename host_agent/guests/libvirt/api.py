"""The only module, apart from tests, that imports libvirt-python.

libvirt-python is imported at the first use: a host with embedded guests only need not have it. This
module also turns libvirt's errors into ours, and keeps libvirt's event loop running.
"""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import cache
from threading import Lock, Thread
from types import ModuleType
from typing import Any, NoReturn

from hintfleet.errors import GuestLost, Refused

_loading = Lock()


def modules() -> tuple[ModuleType, ModuleType]:
    """Return the modules libvirt and libvirt_qemu. The first call starts libvirt's event loop,
    which runs until the process ends.

    :raises Refused: libvirt-python is not installed.
    """
    # The lock, because functools.cache may call a function twice if two threads make the first
    # call at once, and a process can have only one event loop of libvirt's.
    with _loading:
        return _modules()


@cache
def _modules() -> tuple[ModuleType, ModuleType]:
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as error:
        raise Refused(
            f"libvirt-python is not installed: {error}",
            hint="apt-get install python3-libvirt, or, in a virtual environment:"
            " apt-get install libvirt-dev pkg-config gcc && pip install 'hintfleet[host]'",
        ) from error
    # libvirt's default handler prints each error to stderr, though it is also raised.
    libvirt.registerErrorHandler(lambda *_: None, None)
    # Once a loop is registered, new connections answer libvirtd's keepalives through the loop. If
    # the loop does not run, libvirtd closes those connections after 30 s (libvirtd.conf:
    # keepalive_interval, keepalive_count).
    libvirt.virEventRegisterDefaultImpl()
    Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
    return libvirt, libvirt_qemu


def _run_events(libvirt: ModuleType) -> NoReturn:
    while True:
        libvirt.virEventRunDefaultImpl()


@contextlib.contextmanager
def errors_as(what: str, hint: str = "") -> Iterator[None]:
    """Turn libvirt's errors in the block into GuestLost if the domain does not exist, else into
    Refused. `what` begins the message."""
    libvirt, _ = modules()
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise GuestLost(f"{what}: {error}") from error
        raise Refused(f"{what}: {error}", hint=hint) from error


def versions(connection: Any) -> str:
    """Return the versions of libvirt, and of the QEMU that it starts by default.

    :raises Refused: libvirt does not answer.
    """
    with errors_as("asking libvirt for versions"):
        numbers = connection.getLibVersion(), connection.getVersion()
    # libvirt packs a version as major * 1,000,000 + minor * 1,000 + release.
    libvirt, qemu = (f"{n // 1_000_000}.{n // 1000 % 1000}.{n % 1000}" for n in numbers)
    return f"libvirt {libvirt}, QEMU {qemu}"


def hypervisor_of(domain: Any) -> str:
    """Return `versions`, and whether the running domain has KVM or TCG; empty if libvirt does not
    say it, for example while QEMU's package is upgraded.

    :raises GuestLost: the domain is gone.
    """
    with contextlib.suppress(Refused):
        with errors_as("looking at a domain"):
            kind = ET.fromstring(domain.XMLDesc()).get("type")  # noqa: S314 - libvirt's own
        return f"{versions(domain.connect())}, {'KVM' if kind == 'kvm' else 'TCG'}"
    return ""


def quietly(do: Callable[..., object], *arguments: object) -> None:
    """Call a function of libvirt that ends a subscription or a connection; ignore its error, which
    most often says that the connection was lost before."""
    libvirt, _ = modules()
    with contextlib.suppress(libvirt.libvirtError):
        do(*arguments)

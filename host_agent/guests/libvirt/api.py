"""The only module that imports libvirt-python.

It imports libvirt-python late, because only a host with real guests needs it. It turns libvirt's
errors into ours, and keeps libvirt's event loop running.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from threading import Lock, Thread
from types import ModuleType
from typing import NoReturn

from hintfleet.errors import GuestLost, Refused

_loading = Lock()


def modules() -> tuple[ModuleType, ModuleType]:
    """Return libvirt and libvirt_qemu; the event loop runs until the process ends.

    :raises Refused: libvirt-python is not installed.
    """
    # functools.cache may call a function twice if two threads come first together, and there can
    # be only one event loop in a process.
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
    # libvirt's default handler prints each error to stderr, even those that are raised.
    libvirt.registerErrorHandler(lambda *_: None, None)
    # Once a loop is registered, new connections answer libvirtd's keepalives through it. If it
    # does not run, libvirtd cuts them off after 30 s (libvirtd.conf: keepalive_interval, _count).
    libvirt.virEventRegisterDefaultImpl()
    Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
    return libvirt, libvirt_qemu


def _run_events(libvirt: ModuleType) -> NoReturn:
    while True:
        libvirt.virEventRunDefaultImpl()


@contextlib.contextmanager
def errors_as(what: str, hint: str = "") -> Iterator[None]:
    """Turn libvirt's errors into GuestLost or Refused; `what` begins the message."""
    libvirt, _ = modules()
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise GuestLost(f"{what}: {error}") from error
        raise Refused(f"{what}: {error}", hint=hint) from error

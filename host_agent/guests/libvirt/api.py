"""libvirt-python as this package uses it: the one module that imports it.

Imported late, because only a host with real guests needs it; its errors become
ours, and its event loop always runs.
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
    """libvirt and libvirt_qemu, with an event loop that runs and errors left to the caller.

    The loop runs until the process ends: every connection opened once there is one answers
    libvirtd's keepalives through it, and is cut off after 30 s if it does not.

    :raises Refused: libvirt-python is not installed.
    """
    with _loading:  # threads may be the first at once, and there can be one loop only
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
    libvirt.registerErrorHandler(lambda *_: None, None)  # else it prints each error itself
    libvirt.virEventRegisterDefaultImpl()
    Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
    return libvirt, libvirt_qemu


def _run_events(libvirt: ModuleType) -> NoReturn:
    while True:
        libvirt.virEventRunDefaultImpl()


@contextlib.contextmanager
def errors_as(what: str, hint: str = "") -> Iterator[None]:
    """Turn libvirt's errors into ours."""
    libvirt, _ = modules()
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise GuestLost(f"{what}: {error}") from error
        raise Refused(f"{what}: {error}", hint=hint) from error

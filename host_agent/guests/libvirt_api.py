"""libvirt-python as this package uses it: the one module that imports it.

Imported late, because only a host with real guests needs it; its errors become
ours, and its event loop has an owner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from threading import Event, Thread
from types import ModuleType

from hintfleet.errors import GuestLost, Refused


@cache
def modules() -> tuple[ModuleType, ModuleType]:
    """libvirt and libvirt_qemu, with an event loop ready and errors left to the caller.

    :raises Refused: libvirt-python is not installed.
    """
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
    return libvirt, libvirt_qemu


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


class EventLoop:
    """libvirt's event loop in a thread of its own. Connections must be opened after it."""

    def __init__(self) -> None:
        self._libvirt, _ = modules()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="libvirt-events", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._libvirt.virEventRunDefaultImpl()

    def close(self) -> None:
        self._stopping.set()
        # A timer that is due wakes the loop up.
        timer = self._libvirt.virEventAddTimeout(0, lambda *_: None, None)
        self._thread.join()
        self._libvirt.virEventRemoveTimeout(timer)

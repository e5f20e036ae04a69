"""A driver's connection to libvirt, and the events of watched domains. LibvirtDriver and
AttachedDriver have a connection each; only LibvirtDriver watches domains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from hintfleet.errors import GuestLost
from hintfleet.logs import fields
from host_agent.door.door import MemoryDoor
from host_agent.guests.libvirt.api import errors_as, modules, quietly
from host_agent.guests.libvirt.domain_guest import EndNotice
from host_agent.guests.libvirt.qemu_user import QemuUser

# How long a domain that ends by itself may still be there.
_ENDS_WITHIN_S = 5.0
_POLL_S = 0.1

_log = logging.getLogger("hintfleet.host.libvirt")


class Connection:
    """A connection that is opened when it is first needed, and again after it was lost.

    :ivar qemu_user: the user that QEMU runs as; None before the connection was first open, and
        where QEMU runs as this process's user or as root.
    """

    def __init__(self, uri: str) -> None:
        """Store the URI; `get` connects."""
        self.qemu_user: QemuUser | None = None
        self._uri = uri
        self._lock = Lock()
        self._connection: Any = None
        self._owned = contextlib.ExitStack()
        """Ends the subscriptions of `_connection`, and closes it."""
        self._watched: dict[str, EndNotice] = {}

    def get(self) -> Any:
        """Return libvirt's connection object; open the connection if it is not open, or was lost.

        :raises Refused: libvirt-python is not installed, or the URI does not answer.
        """
        libvirt, _ = modules()
        with self._lock:
            # isAlive is false once the channel to libvirtd is closed (src/libvirt-host.c).
            if self._connection is not None and not self._connection.isAlive():
                self._disconnect()
            if self._connection is None:
                with contextlib.ExitStack() as undo:
                    self._connection = self._open(libvirt, undo)
                    self._owned = undo.pop_all()
            return self._connection

    def _open(self, libvirt: ModuleType, undo: contextlib.ExitStack) -> Any:
        """Return a new connection, subscribed to events. Closing `undo` closes it."""
        with errors_as(
            f"cannot connect to libvirt at {self._uri}",
            hint="apt-get install libvirt-daemon-system, start libvirtd, and check the URI;"
            " without root, qemu:///session",
        ):
            connection = libvirt.open(self._uri)
        undo.callback(quietly, connection.close)
        self._subscribe(libvirt, connection, undo)
        with errors_as("asking libvirt which user QEMU has"):
            self.qemu_user = QemuUser.of(connection.getCapabilities())
        _log.info("connected to libvirt", extra=fields(uri=self._uri))
        return connection

    def _disconnect(self) -> None:
        self._connection = None
        self._owned.close()

    def _subscribe(self, libvirt: ModuleType, connection: Any, undo: contextlib.ExitStack) -> None:
        reasons = {
            libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "the guest shut down or was reset",
            libvirt.VIR_DOMAIN_EVENT_STOPPED: "the guest was stopped",
            libvirt.VIR_DOMAIN_EVENT_CRASHED: "the guest crashed",
            libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "the guest was suspended",
        }

        def lifecycle(_connection: Any, domain: Any, event: int, _detail: int, _: None) -> None:
            if event in reasons:
                self._give_notice(domain.UUIDString(), reasons[event])

        # libvirt may report a reset by an event of its own, not by a lifecycle event.
        def reboot(_connection: Any, domain: Any, _: None) -> None:
            self._give_notice(domain.UUIDString(), "the guest was reset")

        def closed(_connection: Any, reason: int, _: None) -> None:
            _log.error("libvirt closed the connection", extra=fields(uri=self._uri, reason=reason))
            for uuid_text in list(self._watched):
                self._give_notice(uuid_text, "the connection to libvirt was lost")

        with errors_as("subscribing to libvirt's events"):
            for kind, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, reboot),
            ):
                number = connection.domainEventRegisterAny(None, kind, callback, None)
                # A callback keeps its connection open even after `close`, so it is removed before
                # (src/conf/object_event.c: virObjectEventCallbackListAddID).
                undo.callback(quietly, connection.domainEventDeregisterAny, number)
            connection.registerCloseCallback(closed, None)
            undo.callback(quietly, connection.unregisterCloseCallback)

    def close(self) -> None:
        """Close the connection, if it is open."""
        with self._lock:
            if self._connection is not None:
                self._disconnect()

    def watch(
        self, uuid_text: str, on_gone: Callable[[str], None], undo: contextlib.ExitStack
    ) -> EndNotice:
        """Watch a domain from now on: the returned EndNotice calls `on_gone` when the domain ends,
        is reset or goes to sleep, or when the connection is lost. Closing `undo` stops that. Call
        this before the domain is made or looked up, so that no event is missed."""
        notice = self._watched[uuid_text] = EndNotice(on_gone)
        undo.callback(self.forget, uuid_text)
        undo.callback(notice.silence)
        return notice

    def forget(self, uuid_text: str) -> None:
        """Stop watching a domain."""
        self._watched.pop(uuid_text, None)

    def domain(self, uuid_text: str) -> Any:
        """Return the libvirt domain with this UUID.

        :raises GuestLost: there is none.
        :raises Refused: libvirt does not answer.
        """
        with errors_as(f"looking for domain {uuid_text}"):
            return self.get().lookupByUUIDString(uuid_text)

    def listen_for_qemu(
        self, loop: asyncio.AbstractEventLoop, path: Path, guest: str
    ) -> MemoryDoor:
        """Return a memory door that listens at `path` and serves the users that QEMU may run as:
        its own, this process's, and root. Raises as `MemoryDoor.listening`."""
        uids = {0, os.geteuid()} | ({self.qemu_user.uid} if self.qemu_user else set())
        return MemoryDoor.listening(loop, path, uids, guest)

    def destroy(self, uuid_text: str) -> None:
        """End a domain; it may be gone already.

        :raises Refused: libvirt failed or does not answer: the domain may run on.
        """
        # Looked up again: a domain object that was made before may belong to a connection that was
        # lost since.
        connection = self.get()
        with contextlib.suppress(GuestLost), errors_as("ending the domain"):
            _destroy(connection.lookupByUUIDString(uuid_text))

    def _give_notice(self, uuid_text: str, reason: str) -> None:
        notice = self._watched.get(uuid_text)
        if notice:
            notice.give(reason)


def _destroy(domain: Any) -> None:
    libvirt, _ = modules()
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        # A domain that ends by itself meanwhile: it is "not running", and gone a moment later.
        until_s = time.monotonic() + _ENDS_WITHIN_S
        while domain.isActive():
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
                raise
            if time.monotonic() > until_s:
                raise
            time.sleep(_POLL_S)

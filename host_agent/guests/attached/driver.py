"""Attached guests: running domains that somebody else made.

All that changes on such a domain is one device, the memory door, in its live configuration. The
domain is never ended, suspended, reset or resized from here. All libvirt calls that change such a
domain are in guests/libvirt/devices.py. Inside the guest, `start_agent` and `stop_agent` change the
agent's configuration and service, through qemu_guest_agent.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from hintfleet.errors import GuestLost, HintfleetError, NotFound, OutcomeUnknown, Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import ATTACHED_CONFIG_PATH, Driver
from hintfleet.system.processes import find_process
from hintfleet.v1 import host_pb2
from host_agent.door.door import MemoryDoor
from host_agent.guests.agent_settings import agent_config
from host_agent.guests.attached.obstacles import described, refuse_if_any
from host_agent.guests.attached.qemu_guest_agent import QemuGuestAgent
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.guests.driver import GuestRequest, Handle, Survival
from host_agent.guests.libvirt.api import errors_as, hypervisor_of
from host_agent.guests.libvirt.connection import Connection
from host_agent.guests.libvirt.devices import doors_in, plug_door, unplug_door
from host_agent.guests.libvirt.runtime_dir import RuntimeDir
from host_agent.memory.ram import GuestRam, Segment

# How long the kernel of a guest that has booted may take to bind the device of the memory door.
_OPEN_TIMEOUT_S = 15.0

# How long libvirt may take to notice that QEMU has ended.
_END_TIMEOUT_S = 10.0
_POLL_S = 0.2

_SERVICE = "hintfleet-guest"

_NOT_OURS = "the guest's domain is somebody else's: its memory is not resized from here"


class AttachedGuest:
    """A domain with the memory door in it."""

    balloon: Balloon | None = None
    reporting: Reporting | None = None

    def __init__(
        self,
        connection: Connection,
        uuid_text: str,
        domain: Any,
        hypervisor: str,
        door: MemoryDoor,
        ram: GuestRam,
        owned: contextlib.ExitStack,
    ) -> None:
        """:param owned: closes RAM and door; without Survival, also removes the folder of the
        door's socket."""
        self.pid = door.pid
        self.domain: str = domain.name()
        self.hypervisor = hypervisor
        self._uuid = uuid_text
        self.handle: Handle = {"start": domain.ID(), **_process(door.pid)}
        """Identifies this start of the domain: libvirt's number of it, and its QEMU. (The domain
        is found by its UUID.)"""
        self.ram = ram
        self.door: MemoryDoor | None = door
        self._connection = connection
        self._owned = owned

    def plugged(self) -> RangeSet:
        return EMPTY

    def plug(self, size_bytes: int) -> Sequence[Segment]:  # noqa: ARG002
        raise Refused(_NOT_OURS)

    def to_unplug(self, size_bytes: int) -> Sequence[RangeSet]:  # noqa: ARG002
        raise Refused(_NOT_OURS)

    def unplug(self, pages: RangeSet) -> None:  # noqa: ARG002
        raise Refused(_NOT_OURS)

    def evidence(self) -> str:
        return ""

    def close(self) -> None:
        """Take the door out of the domain, if that still runs, without ending it, and free RAM and
        door. May be called again. If it raises, nothing is freed, except the RAM if QEMU has hung
        up.

        :raises Refused: libvirt failed or does not answer, or the guest refused to release the
            door.
        :raises OutcomeUnknown: the guest did not answer in time.
        """
        if self.door is not None and not self.door.pages():
            self.ram.close()  # QEMU has hung up: free the memory even if libvirt does not answer
        with contextlib.suppress(GuestLost):
            unplug_door(self._connection.domain(self._uuid))
        self._owned.close()


class AttachedDriver:
    """Finds domains, plugs a memory door into them, and starts and stops the agents in them."""

    def __init__(
        self,
        uri: str,
        loop: asyncio.AbstractEventLoop,
        *,
        guest_server: str,
        guest_tls: bool = False,
        survival: Survival | None = None,
    ) -> None:
        """Store settings; the connection is opened when it is first needed.

        :param loop: serves the doors.
        :param guest_server: address at which guests on user-mode networking find the host agent.
        :param guest_tls: whether guests must use TLS.
        """
        self._guest_server = guest_server
        self._guest_tls = guest_tls
        self._connection = Connection(uri)
        self._loop = loop
        self._survival = survival

    def domains(self) -> list[host_pb2.Domain]:
        """Return all domains, sorted by name, each with what keeps it from being hinted.

        :raises Refused: libvirt does not answer.
        """
        with errors_as("listing the domains"):
            found = self._connection.get().listAllDomains()
        return sorted(filter(None, map(described, found)), key=lambda one: one.name)

    def find(self, name: str) -> host_pb2.Domain:
        """Return the domain with this name or UUID.

        :raises NotFound: there is none.
        :raises Refused: libvirt does not answer.
        """
        # Not lookupByUUIDString: given a name, it raises an error that `errors_as` turns into
        # Refused, as if libvirt had failed.
        with errors_as("looking for the domain"):
            domains = self._connection.get().listAllDomains()
        for domain in domains:
            is_meant = name == domain.name() or name.lower() == domain.UUIDString()
            if is_meant and (found := described(domain)):
                return found
        raise NotFound(f"no domain {name!r} on this host")

    def agent_config(self, request: GuestRequest, server: str = "") -> str:
        """Return the configuration of the guest's agent, JSON.

        :param server: address at which the guest finds the host agent; empty for a guest on
            user-mode networking.
        :raises Refused: no attached guest can have such settings.
        :raises InvalidInput: a setting is out of its bounds.
        """
        server = server or self._guest_server
        # None for Survival: without a host agent, an attached guest's agent waits without limit.
        config = agent_config(Driver.LIBVIRT, request, server, None, tls=self._guest_tls)
        return config.to_json()

    def start_agent(self, uuid_text: str, config: str) -> None:
        """Put the agent's configuration into the guest, and enable and restart the agent's service,
        through the QEMU guest agent. After a failure, do what `stop_agent` does, if that works.

        :raises Refused: the QEMU guest agent does not answer, or a command fails in the guest.
        :raises GuestLost: the domain is gone.
        """
        guest_agent = QemuGuestAgent(self._connection.domain(uuid_text))
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop_agent_quietly, uuid_text)
            guest_agent.write(ATTACHED_CONFIG_PATH, config)
            guest_agent.run("systemctl", "enable", _SERVICE)
            guest_agent.run("systemctl", "restart", _SERVICE)
            undo.pop_all()

    def _stop_agent_quietly(self, uuid_text: str) -> None:
        with contextlib.suppress(HintfleetError):
            self.stop_agent(uuid_text)

    def stop_agent(self, uuid_text: str) -> None:
        """Stop and disable the agent's service and remove its configuration, through the QEMU
        guest agent.

        :raises Refused: the QEMU guest agent does not answer, or a command fails in the guest.
        :raises GuestLost: the domain is gone.
        """
        guest_agent = QemuGuestAgent(self._connection.domain(uuid_text))
        guest_agent.run("systemctl", "disable", "--now", _SERVICE)
        guest_agent.run("rm", "-f", ATTACHED_CONFIG_PATH)

    def create(self, request: GuestRequest) -> AttachedGuest:
        """Plug the door into the domain with the request's UUID. A door that a killed host agent
        left there is taken out first.

        :raises Refused: the domain has obstacles, the guest refused to release an old door, libvirt
            or QEMU failed, the door's socket cannot be made, the guest's kernel does not bind the
            device, or the guest's memory cannot be punched. The new door is taken out again, if the
            guest releases it.
        :raises OutcomeUnknown: the guest did not release an old door in time.
        :raises GuestLost: the domain is gone.
        """
        return self._attach(request)

    def adopt(self, request: GuestRequest, handle: Handle) -> AttachedGuest:  # noqa: ARG002
        try:
            return self._attach(request)
        except (Refused, OutcomeUnknown) as error:
            # For example, the guest is suspended. Not Refused: that would keep this host agent
            # from starting, and so from serving all other guests.
            raise GuestLost(f"it cannot be attached again: {error.message}") from error

    def has_ended(self, uuid_text: str, handle: Handle) -> bool:
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                domain = self._connection.domain(uuid_text)
                with errors_as("looking at a domain"):
                    xml = ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirt's own
                # `id` and the doors are read from one answer of libvirt: the domain may end between
                # two. The XML has an `id` only while the domain runs.
                if xml.get("id") != str(handle["start"]):
                    return True
                # While the door is in the XML, ask again: QEMU may have ended, and libvirt notices
                # that a moment later.
                if not doors_in(xml):
                    return False
            except GuestLost:
                return True
            time.sleep(_POLL_S)
        return False

    def runs(self, uuid_text: str) -> bool:
        domain = self._connection.domain(uuid_text)
        with errors_as("looking at a domain"):
            return bool(domain.isActive())

    def _attach(self, request: GuestRequest) -> AttachedGuest:
        domain = self._connection.domain(request.uuid)
        # Check a domain that is attached again, too: its configuration may have changed since.
        if found := described(domain):
            refuse_if_any(found)
        # A door that is still there is served by nobody: a served one is an obstacle.
        unplug_door(domain)
        with contextlib.ExitStack() as owned:
            door = self._door(request, owned)
            with contextlib.ExitStack() as undo:
                # Register the unplugging before plugging: libvirt may fail after the device is
                # plugged in.
                undo.callback(_unplug_quietly, domain)
                plug_door(domain, door.path)
                if not door.wait_until_open(_OPEN_TIMEOUT_S):
                    raise Refused(
                        "the guest's kernel did not bind the memory door within"
                        f" {_OPEN_TIMEOUT_S:g} s",
                        hint="it needs the driver virtiofs: `modprobe virtiofs` in the guest",
                    )
                hypervisor = hypervisor_of(domain)
                ram = GuestRam(door.segments(), door.fence)
                undo.pop_all()
            owned.callback(ram.close)
            guest = AttachedGuest(
                self._connection, request.uuid, domain, hypervisor, door, ram, owned.pop_all()
            )
        door.when_disconnected(request.on_gone)
        return guest

    def _door(self, request: GuestRequest, owned: contextlib.ExitStack) -> MemoryDoor:
        self._connection.get()  # opens the connection, which sets its `qemu_user`
        if self._survival:
            path = self._survival.door(request.uuid)
        else:
            folder = RuntimeDir.make(self._connection.qemu_user)
            owned.callback(folder.remove)
            path = folder.door
        door = self._connection.listen_for_qemu(self._loop, path, request.name)
        owned.callback(door.close)
        return door

    def close(self) -> None:
        self._connection.close()


def _process(pid: int) -> Handle:
    """Return what identifies a QEMU; a start time of 0 if /proc does not show it."""
    # libvirt's number of a start is not enough: a libvirtd that starts continues after the largest
    # number among the domains that run then (src/qemu/qemu_driver.c: qemuDomainFindMaxID). So a
    # domain that was shut down before may get its old number again.
    with contextlib.suppress(OSError):
        if found := find_process(pid):
            return {"pid": pid, "start_ticks": found.start_ticks}
    return {"pid": pid, "start_ticks": 0}


def _unplug_quietly(domain: Any) -> None:
    with contextlib.suppress(Refused, GuestLost, OutcomeUnknown):
        unplug_door(domain)

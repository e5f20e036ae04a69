"""Real guests: transient libvirt domains under QEMU.

A domain is bound to this driver's connection (VIR_DOMAIN_START_AUTODESTROY): when a host agent
dies, libvirt ends all its domains. Under Survival a domain is not bound, and lives on: the next
host agent finds the domain by its UUID, and plugs in a memory door of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from pathlib import Path
from threading import Lock
from typing import Any

from hintfleet.agent_config import AgentConfig
from hintfleet.errors import GuestLost, HintfleetError, OutcomeUnknown, Refused
from hintfleet.program import printable
from hintfleet.settings import Driver, IsolatorKind, Method
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.door.door import MemoryDoor
from host_agent.guests.agent_settings import agent_config
from host_agent.guests.driver import GuestRequest, Handle, Survival
from host_agent.guests.libvirt import kvm_probe
from host_agent.guests.libvirt.api import errors_as, hypervisor_of, modules, versions
from host_agent.guests.libvirt.connection import Connection
from host_agent.guests.libvirt.devices import plug_door, unplug_door
from host_agent.guests.libvirt.dimms import Dimms
from host_agent.guests.libvirt.domain_balloon import LibvirtBalloon, LibvirtReporting
from host_agent.guests.libvirt.domain_guest import EndNotice, LibvirtGuest
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX, DomainSpec, Memballoon, domain_xml
from host_agent.guests.libvirt.image import GuestImage, find_image
from host_agent.guests.libvirt.runtime_dir import RuntimeDir
from host_agent.memory.ram import GuestRam

_EVIDENCE_LINES = 40
_PROBE_MEMORY_BYTES = 256 * MIB
# How long a guest may take to boot until its kernel binds the device of the memory door.
_OPEN_TIMEOUT_S = 120.0
# How long libvirtd may take to end the domains of a host agent that was killed.
_FREE_WITHIN_S = 20.0
_POLL_S = 0.2

_MEMBALLOONS = {
    host_pb2.REPORTING: Memballoon.REPORTING,
    host_pb2.BALLOON: Memballoon.TARGET,
}


class LibvirtDriver:
    """Makes and adopts guests on one connection to libvirt."""

    def __init__(
        self,
        uri: str,
        loop: asyncio.AbstractEventLoop,
        *,
        guest_server: str,
        guest_tls: bool = False,
        images: Path | None = None,
        survival: Survival | None = None,
        partition: str = "",
    ) -> None:
        """Store settings; the connection is opened when it is first needed.

        :param loop: serves the guests' memory doors.
        :param guest_server: address at which guests find the host agent: `10.0.2.2:PORT` if the
            host agent listens on the host's loopback.
        :param guest_tls: whether guests must use TLS; their certificates are in them already.
        :param images: directory of guest images; None for the default one.
        :param partition: the libvirt partition of all domains; empty for libvirt's default.
        """
        self._connection = Connection(uri)
        self._loop = loop
        self._guest_server = guest_server
        self._guest_tls = guest_tls
        self._images = images
        self._survival = survival
        self._partition = partition
        self._probing = Lock()
        self._kvm_fails = False
        """Whether the guest of the probe could not be started under KVM; then this driver does not
        probe again."""

    def state(self) -> host_pb2.DriverState:
        try:
            connection = self._connection.get()
            image = find_image(self._images)
            self._check_reach(image)
            detail = versions(connection)
        except HintfleetError as error:
            return host_pb2.DriverState(driver=host_pb2.LIBVIRT, usable=False, detail=str(error))
        boots = {True: "KVM", False: "TCG (KVM does not boot here)", None: "KVM not probed yet"}
        detail += f", {boots[kvm_probe.cached(image)]}"
        return host_pb2.DriverState(driver=host_pb2.LIBVIRT, usable=True, detail=detail)

    def create(self, request: GuestRequest) -> LibvirtGuest:
        config = self._agent_config(request)
        image = find_image(self._images, request.spec.image)
        connection = self._connection.get()
        self._check_reach(image)
        _wait_until_free(connection, request)
        accelerator = self._accelerator(connection, image)
        files = self._files(request.name)
        with contextlib.ExitStack() as undo:
            undo.callback(files.remove)
            door = self._door(request, files, undo)
            spec = self._domain_spec(request, image, accelerator, files, config, door)
            end_notice = self._connection.watch(request.uuid, request.on_gone, undo)
            domain = _start(connection, spec, lasting=self._survival is not None)
            undo.callback(self._connection.destroy, request.uuid)
            try:
                return self._take_over(request, domain, files, door, end_notice, undo)
            except GuestLost as error:
                said = printable(files.console_tail(_EVIDENCE_LINES))
                raise GuestLost(f"{error.message}; its last output:\n{said}") from error

    def adopt(self, request: GuestRequest, handle: Handle) -> LibvirtGuest:  # noqa: ARG002
        connection = self._connection.get()
        with contextlib.ExitStack() as undo:
            end_notice = self._connection.watch(request.uuid, request.on_gone, undo)
            with errors_as("while there was no host agent"):
                domain = connection.lookupByUUIDString(request.uuid)
            files = self._files(request.name)
            door = self._door(request, files, undo)
            try:
                # Nobody serves the earlier host agent's door any more.
                unplug_door(domain)
                plug_door(domain, door.path)
            except (Refused, OutcomeUnknown) as error:
                # For example, a suspended guest releases no device. Not Refused: that would keep
                # this host agent from starting, and so from serving all other guests.
                raise GuestLost(f"it cannot be adopted: {error.message}") from error
            return self._take_over(request, domain, files, door, end_notice, undo)

    def _files(self, name: str) -> RuntimeDir:
        if self._survival:
            return RuntimeDir.at(self._survival.folder / name)
        return RuntimeDir.make(self._connection.qemu_user)

    def _door(
        self, request: GuestRequest, files: RuntimeDir, undo: contextlib.ExitStack
    ) -> MemoryDoor:
        path = self._survival.door(request.uuid) if self._survival else files.door
        door = self._connection.listen_for_qemu(self._loop, path, request.name)
        undo.callback(door.close)
        return door

    def _check_reach(self, image: GuestImage) -> None:
        """Check that QEMU's user can read the image's root disk and, under Survival, enter the
        guests' folder. Without this check QEMU would fail later, with a message that is less clear.

        :raises Refused: it cannot; names the folder or file that denies access.
        """
        if self._connection.qemu_user is None:
            return
        self._connection.qemu_user.check(
            image.root_disk, "build the image elsewhere: HINTFLEET_IMAGE_DIR"
        )
        if self._survival:
            self._connection.qemu_user.check(self._survival.folder, "choose another --state DIR")

    def _take_over(
        self,
        request: GuestRequest,
        domain: Any,
        files: RuntimeDir,
        door: MemoryDoor,
        end_notice: EndNotice,
        undo: contextlib.ExitStack,
    ) -> LibvirtGuest:
        """Wait until the memory door is open, and return the domain as a guest. From then on the
        guest owns what `undo` would undo. After a failure, `undo` still undoes all.

        :raises GuestLost: the domain has ended meanwhile, or did not open the door in time.
        :raises Refused: the guest's memory cannot be punched.
        """
        _wait_until_open(door, domain)
        hypervisor = hypervisor_of(domain)
        ram = GuestRam(door.segments(), door.fence)
        undo.callback(ram.close)
        method = request.spec.method
        guest = LibvirtGuest(
            domain=domain.name(),
            ram=ram,
            door=door,
            balloon=LibvirtBalloon(domain) if method == host_pb2.BALLOON else None,
            reporting=LibvirtReporting(domain) if method == host_pb2.REPORTING else None,
            dimms=Dimms(domain, door, node=(request.spec.node_count or 1) - 1),
            hypervisor=hypervisor,
            files=files,
            end_notice=end_notice,
            forget=lambda: self._connection.forget(request.uuid),
            end=lambda: self._connection.destroy(request.uuid),
        )
        undo.pop_all()
        return guest

    def close(self) -> None:
        self._connection.close()

    def _domain_spec(
        self,
        request: GuestRequest,
        image: GuestImage,
        accelerator: str,
        files: RuntimeDir,
        config: AgentConfig,
        door: MemoryDoor,
    ) -> DomainSpec:
        files.write_config(config.to_json())
        return DomainSpec(
            name=request.name,
            uuid=request.uuid,
            accelerator=accelerator,
            memory_bytes=request.spec.memory_bytes,
            max_memory_bytes=request.spec.max_memory_bytes,
            node_count=request.spec.node_count or 1,
            image=image,
            console=files.console,
            config=files.config,
            door=door.path,
            parameters=_kernel_parameters(request.spec, config),
            memballoon=_MEMBALLOONS.get(request.spec.method, Memballoon.NONE),
            partition=self._partition,
        )

    def _agent_config(self, request: GuestRequest) -> AgentConfig:
        return agent_config(
            Driver.LIBVIRT, request, self._guest_server, self._survival, tls=self._guest_tls
        )

    def _accelerator(self, connection: Any, image: GuestImage) -> str:
        # One probe at a time: guests that are made together wait for the same answer.
        with self._probing:
            boots = kvm_probe.cached(image)
            if boots is None and not self._kvm_fails:
                boots = self._boots_under_kvm(connection, image)
                self._kvm_fails = boots is None
                if boots is not None:
                    kvm_probe.remember(image, boots)
        return "kvm" if boots else "qemu"

    def _boots_under_kvm(self, connection: Any, image: GuestImage) -> bool | None:
        """Boot a guest without agent under KVM, and end it. Return whether it booted; None if it
        could not be started. KVM need not be the reason for that, so the caller does not
        store None for later host agents."""
        identity = uuid.uuid4()
        name = f"kvm-probe-{identity.hex[:8]}"
        files = self._files(name)
        spec = DomainSpec(
            name=name,
            uuid=str(identity),
            accelerator="kvm",
            memory_bytes=_PROBE_MEMORY_BYTES,
            image=image,
            console=files.console,
            config=None,
            door=None,
        )
        try:
            _start(connection, spec)
            try:
                return kvm_probe.wait_for_boot(spec.console)
            finally:
                # If `destroy` fails, the answer still counts, and libvirt ends the domain when the
                # connection is closed.
                with contextlib.suppress(Refused):
                    self._connection.destroy(spec.uuid)
        except Refused:  # for example, libvirt has no KVM, or QEMU failed
            return None
        finally:
            files.remove()


def _kernel_parameters(spec: host_pb2.GuestSpec, config: AgentConfig) -> list[str]:
    parameters = spec.kernel_parameters.split()
    if config.method is Method.HINTING and config.isolator is IsolatorKind.KMOD:
        ours = ["hintfleet.isolator=kmod", f"hintfleet.order={config.chunk_order}"]
        return [*ours, *parameters]
    return parameters


def _wait_until_free(connection: Any, request: GuestRequest) -> None:
    """Wait until no domain has this guest's name or UUID: libvirtd may still be ending those of a
    host agent that was killed, one after the other.

    :raises Refused: one still has it after 20 s.
    """
    name = NAME_PREFIX + request.name
    until_s = time.monotonic() + _FREE_WITHIN_S
    while taken := _domain_with(connection, name, request.uuid):
        if time.monotonic() > until_s:
            raise Refused(
                f"cannot start domain {name}: there is a domain {taken} already",
                hint=f"virsh destroy {taken}, or choose another name",
            )
        time.sleep(_POLL_S)


def _domain_with(connection: Any, name: str, uuid_text: str) -> str:
    """Return the name of a domain that has this name or UUID; empty if there is none."""
    libvirt, _ = modules()
    for lookup, key in (
        (connection.lookupByName, name),
        (connection.lookupByUUIDString, uuid_text),
    ):
        with contextlib.suppress(libvirt.libvirtError):
            return str(lookup(key).name())
    return ""


def _start(connection: Any, spec: DomainSpec, *, lasting: bool = False) -> Any:
    """Create and start the domain.

    :param lasting: whether it must outlive the connection.
    :raises Refused: libvirt or QEMU refused.
    """
    libvirt, _ = modules()
    name = NAME_PREFIX + spec.name
    with errors_as(
        f"cannot start domain {name}",
        hint="QEMU (apt-get install qemu-system-x86) runs as a user of its own under"
        f" qemu:///system, who must be able to read {spec.image.directory} and"
        f" {spec.console.parent}",
    ):
        flags = 0 if lasting else libvirt.VIR_DOMAIN_START_AUTODESTROY
        return connection.createXML(domain_xml(spec), flags)


def _wait_until_open(door: MemoryDoor, domain: Any) -> None:
    """Wait until the guest's kernel has bound the memory door: a virtiofs device.

    :raises GuestLost: the domain has ended, or does not bind it in time.
    """
    libvirt, _ = modules()
    deadline_s = time.monotonic() + _OPEN_TIMEOUT_S
    while not door.wait_until_open(_POLL_S):
        # isActive raises if a transient domain has ended, because libvirt has deleted it.
        with contextlib.suppress(libvirt.libvirtError):
            if domain.isActive():
                if time.monotonic() < deadline_s:
                    continue
                raise GuestLost(
                    f"its kernel did not open the memory door within {_OPEN_TIMEOUT_S:g} s:"
                    " it needs the driver virtiofs"
                )
        raise GuestLost("it ended before its kernel opened the memory door")

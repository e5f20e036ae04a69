"""The RAM of a running libvirt domain: where it lies, and DIMMs that come and go."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

from hintfleet.errors import HintfleetError, OutcomeUnknown, Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import KIB, format_size
from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.dimm_xml import Dimm, dimm_xml, dimms_of
from host_agent.guests.libvirt.qemu_ram import open_segments, process_of_thread
from host_agent.memory.ram import GuestRam, Segment

_REMOVAL_S = 20.0
"""The guest has put the memory offline before: what is left to it are some milliseconds."""


def translate(domain: Any) -> GuestRam:
    """The RAM of a running domain, as parts of QEMU's files.

    :param domain: a libvirt.virDomain, of this or any other maker.
    :raises Refused: it has no shared memory backing of its own, runs on another
        machine, or is not understood; says what to change.
    :raises GuestLost: it is gone.
    """
    with errors_as("looking into the domain's memory"):
        memory_bytes = domain.maxMemory() * KIB
    return GuestRam(open_segments(qemu_pid(domain), memory_bytes, _monitor(domain)))


def qemu_pid(domain: Any) -> int:
    """Process id of a running domain's QEMU, said by QEMU itself.

    Not from a pid file, whose place depends on the URI.
    """
    _, libvirt_qemu = modules()
    with errors_as("asking QEMU for its process id"):
        query = json.dumps({"execute": "query-cpus-fast"})
        cpus = json.loads(libvirt_qemu.qemuMonitorCommand(domain, query, 0))["return"]
        return process_of_thread(cpus[0]["thread-id"], domain.UUIDString())


def _monitor(domain: Any) -> Callable[[str], str]:
    """QEMU's human monitor."""
    _, libvirt_qemu = modules()

    def run(command: str) -> str:
        with errors_as("looking into the domain's memory"):
            hmp = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            return str(libvirt_qemu.qemuMonitorCommand(domain, command, hmp))

    return run


class Dimms:
    """The DIMMs of a domain that was made with a maximum and slots for them."""

    def __init__(self, domain: Any, node: int) -> None:
        """:param node: NUMA node of the guest that DIMMs come to."""
        self._domain = domain
        self._node = node

    def pages(self) -> RangeSet:
        """Of all DIMMs that the domain has now."""
        return RangeSet(pages for dimm in self._dimms() for pages in dimm.pages)

    def plug(self, size_bytes: int, ram: RangeSet) -> list[Segment]:
        """Attach one DIMM; returns where it lies.

        :param ram: what the domain had before.
        :raises Refused: no slot is free, or it is not backed as it must be.
        """
        libvirt, _ = modules()
        before = {dimm.alias for dimm in self._dimms()}
        with errors_as(f"plugging a DIMM of {format_size(size_bytes)}"):
            xml = dimm_xml(size_bytes, self._node)
            self._domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            return open_segments(
                qemu_pid(self._domain), size_bytes, _monitor(self._domain), besides=ram
            )
        except HintfleetError:
            for dimm in self._dimms():
                if dimm.alias not in before:
                    self._detach(dimm)
            raise

    def to_unplug(self, size_bytes: int) -> list[RangeSet]:
        """The highest DIMMs that make up so much, each with its pages.

        :raises Refused: DIMMs go whole, and none fit.
        """
        found: list[RangeSet] = []
        left_bytes = size_bytes
        for dimm in sorted(self._dimms(), key=lambda d: d.address, reverse=True):
            if left_bytes <= 0:
                break
            found.append(dimm.pages)
            left_bytes -= dimm.size_bytes
        if left_bytes:
            sizes = ", ".join(format_size(dimm.size_bytes) for dimm in self._dimms())
            raise Refused(
                f"{format_size(size_bytes)} cannot be unplugged: the guest has DIMMs of {sizes}",
                hint="they go whole, the highest address first",
            )
        return found

    def unplug(self, pages: RangeSet) -> None:
        """Detach the DIMM of these pages and wait until QEMU has let go of it.

        :raises Refused: the guest holds on to it; it stays.
        :raises OutcomeUnknown: the guest did not say in time.
        """
        for dimm in self._dimms():
            if dimm.pages == pages:
                self._detach(dimm)

    def _dimms(self) -> list[Dimm]:
        with errors_as("looking at the domain's DIMMs"):
            return dimms_of(self._domain.XMLDesc())

    def _detach(self, dimm: Dimm) -> None:
        libvirt, _ = modules()
        with _removal_of(dimm, self._domain) as removed:
            with errors_as(f"unplugging {dimm.alias}"):
                self._domain.detachDeviceFlags(dimm.xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            try:
                went = removed.get(timeout=_REMOVAL_S)
            except queue.Empty:
                raise OutcomeUnknown(
                    f"the guest did not let go of {dimm.alias} within {_REMOVAL_S:g} s"
                ) from None
        if not went:
            raise Refused(f"the guest refused to let go of {dimm.alias}")


@contextlib.contextmanager
def _removal_of(dimm: Dimm, domain: Any) -> Iterator[queue.SimpleQueue[bool]]:
    """What becomes of the removal of a DIMM, once libvirt says it: whether it went."""
    libvirt, _ = modules()
    said: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def hear(_connection: Any, _domain: Any, alias: str, went: bool) -> None:
        if alias == dimm.alias:
            said.put(went)

    with contextlib.ExitStack() as undo, errors_as("subscribing to libvirt's events"):
        connection = domain.connect()
        for event, went in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, True),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, False),
        ):
            number = connection.domainEventRegisterAny(domain, event, hear, went)
            undo.callback(connection.domainEventDeregisterAny, number)
        yield said

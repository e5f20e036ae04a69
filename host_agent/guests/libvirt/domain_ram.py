"""The RAM of a running libvirt domain: finds its files, plugs and unplugs DIMMs."""

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

# The guest has put the memory offline before, so it needs some milliseconds only.
_REMOVAL_S = 20.0


def translate(domain: Any) -> GuestRam:
    """Return the RAM of a running domain, as parts of QEMU's files.

    :param domain: a libvirt.virDomain, made by this host agent or by anybody else.
    :raises Refused: it has no shared memory backing of its own, runs on another machine, or
        QEMU's answers are not understood; says what to change.
    :raises GuestLost: it is gone.
    """
    with errors_as("looking into the domain's memory"):
        memory_bytes = domain.maxMemory() * KIB
    return GuestRam(open_segments(qemu_pid(domain), memory_bytes, _monitor(domain)))


def qemu_pid(domain: Any) -> int:
    """Return the process id of a running domain's QEMU."""
    # From QEMU itself: where libvirt has its pid file depends on the URI. QMP does not tell the
    # process id, but the thread ids of virtual CPUs.
    _, libvirt_qemu = modules()
    with errors_as("asking QEMU for its process id"):
        query = json.dumps({"execute": "query-cpus-fast"})
        cpus = json.loads(libvirt_qemu.qemuMonitorCommand(domain, query, 0))["return"]
        return process_of_thread(cpus[0]["thread-id"], domain.UUIDString())


def _monitor(domain: Any) -> Callable[[str], str]:
    """Return a function that runs a command of QEMU's human monitor (HMP)."""
    # QMP has neither `info mtree` nor `gpa2hva`.
    _, libvirt_qemu = modules()

    def run(command: str) -> str:
        with errors_as("looking into the domain's memory"):
            hmp = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            return str(libvirt_qemu.qemuMonitorCommand(domain, command, hmp))

    return run


class Dimms:
    """The DIMMs of a domain that was made with a maximum and slots for them."""

    def __init__(self, domain: Any, node: int) -> None:
        """:param node: NUMA node of the guest that gets the DIMMs."""
        self._domain = domain
        self._node = node

    def pages(self) -> RangeSet:
        """Return the pages of all DIMMs that the domain has now."""
        return RangeSet(pages for dimm in self._dimms() for pages in dimm.pages)

    def plug(self, size_bytes: int, ram: RangeSet) -> list[Segment]:
        """Attach one DIMM; return its segments.

        :param ram: the RAM that the domain had before.
        :raises Refused: no slot is free, or the DIMM is not backed by a shared memfd. It is
            detached again then.
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
        """Return the pages of the highest DIMMs that have this size together, DIMM by DIMM.

        :raises Refused: no such DIMMs: a DIMM can be unplugged only as a whole.
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
                hint="a DIMM is unplugged as a whole, the one with the highest address first",
            )
        return found

    def unplug(self, pages: RangeSet) -> None:
        """Detach the DIMM with these pages and wait until QEMU has removed it.

        :raises Refused: the guest refused; the DIMM stays.
        :raises OutcomeUnknown: the guest did not answer in time.
        """
        for dimm in self._dimms():
            if dimm.pages == pages:
                self._detach(dimm)

    def _dimms(self) -> list[Dimm]:
        with errors_as("looking at the domain's DIMMs"):
            return dimms_of(self._domain.XMLDesc())

    def _detach(self, dimm: Dimm) -> None:
        libvirt, _ = modules()
        # Subscribe before detaching: detachDeviceFlags returns when the guest has been asked, and
        # only an event tells what the guest did.
        with _removal_of(dimm, self._domain) as removed:
            with errors_as(f"unplugging {dimm.alias}"):
                self._domain.detachDeviceFlags(dimm.xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            try:
                was_removed = removed.get(timeout=_REMOVAL_S)
            except queue.Empty:
                raise OutcomeUnknown(
                    f"the guest did not release {dimm.alias} within {_REMOVAL_S:g} s"
                ) from None
        if not was_removed:
            raise Refused(f"the guest refused to release {dimm.alias}")


@contextlib.contextmanager
def _removal_of(dimm: Dimm, domain: Any) -> Iterator[queue.SimpleQueue[bool]]:
    """Subscribe to the removal of a DIMM during the block: the queue gets whether it was removed,
    once libvirt knows."""
    libvirt, _ = modules()
    results: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def on_event(_connection: Any, _domain: Any, alias: str, was_removed: bool) -> None:
        if alias == dimm.alias:
            results.put(was_removed)

    with contextlib.ExitStack() as undo, errors_as("subscribing to libvirt's events"):
        connection = domain.connect()
        for event, was_removed in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, True),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, False),
        ):
            number = connection.domainEventRegisterAny(domain, event, on_event, was_removed)
            undo.callback(connection.domainEventDeregisterAny, number)
        yield results

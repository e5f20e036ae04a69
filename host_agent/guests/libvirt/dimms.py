"""The DIMMs of a running libvirt domain: plugs and unplugs them, for host_agent/resizing.py."""

from __future__ import annotations

import contextlib
from typing import Any

from hintfleet.errors import HintfleetError, Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES, format_size
from host_agent.door.door import MemoryDoor
from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.devices import detach
from host_agent.guests.libvirt.dimm_xml import Dimm, dimm_xml, dimms_of
from host_agent.memory.ram import Segment, close_files


class Dimms:
    """The DIMMs of a domain. Only a domain with a maximum size and slots can get any."""

    def __init__(self, domain: Any, door: MemoryDoor, node: int) -> None:
        """:param door: the memory door at which QEMU hands over the memory of a new DIMM.
        :param node: the guest's NUMA node into which DIMMs are plugged.
        """
        self._domain = domain
        self._door = door
        self._node = node

    def pages(self) -> RangeSet:
        """Return the pages of all DIMMs that the domain has now."""
        return RangeSet(pages for dimm in self._dimms() for pages in dimm.pages)

    def plug(self, size_bytes: int, ram: RangeSet) -> list[Segment]:
        """Attach one DIMM; return its segments, which the caller then owns.

        :param ram: the RAM that the domain had before.
        :raises Refused: libvirt refused (for example, no slot is free), or QEMU did not hand over
            the DIMM's memory in a shared memfd. In the second case the DIMM is detached again, if
            the guest releases it; else `pages` has it.
        """
        libvirt, _ = modules()
        before = {dimm.alias for dimm in self._dimms()}
        with errors_as(f"plugging a DIMM of {format_size(size_bytes)}"):
            xml = dimm_xml(size_bytes, self._node)
            self._domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        added = [dimm for dimm in self._dimms() if dimm.alias not in before]
        try:
            # QEMU sends a new region to the door before it answers libvirt.
            segments = self._door.segments(besides=ram)
            if sum(segment.page_count for segment in segments) * PAGE_BYTES != size_bytes:
                close_files(segments)
                raise Refused("QEMU did not hand over the DIMM's memory: is the guest stopped?")
        except HintfleetError:
            for dimm in added:
                with contextlib.suppress(HintfleetError):
                    detach(self._domain, dimm.alias, dimm.xml)
            raise
        return segments

    def to_unplug(self, size_bytes: int) -> list[RangeSet]:
        """Return the pages of the DIMMs with the highest addresses, as many DIMMs as have this size
        together: one set of pages for each DIMM.

        :raises Refused: there are no such DIMMs; a DIMM can be unplugged only as a whole.
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
        """Detach the DIMM that has exactly these pages, if any; wait until QEMU has removed it.

        :raises Refused: libvirt or the guest refused; the DIMM stays.
        :raises OutcomeUnknown: the guest did not answer in time, and may still release the DIMM.
        """
        for dimm in self._dimms():
            if dimm.pages == pages:
                detach(self._domain, dimm.alias, dimm.xml)

    def _dimms(self) -> list[Dimm]:
        with errors_as("looking at the domain's DIMMs"):
            return dimms_of(self._domain.XMLDesc())

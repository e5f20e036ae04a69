"""The XML of a libvirt domain's DIMMs: builds it from values and parses it. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from hintfleet.ranges import RangeSet
from hintfleet.units import KIB, PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Dimm:
    """A DIMM that is plugged.

    :ivar alias: libvirt's name for the DIMM, in libvirt's events too.
    :ivar address: address of its first byte, guest physical.
    :ivar xml: the DIMM's element of the live XML; libvirt needs it to detach the DIMM.
    """

    alias: str
    address: int
    size_bytes: int
    xml: str

    @property
    def pages(self) -> RangeSet:
        """The guest's page frames that are on the DIMM."""
        return RangeSet([(self.address // PAGE_BYTES, self.size_bytes // PAGE_BYTES)])


def dimm_xml(size_bytes: int, node: int) -> str:
    """Return the XML to plug a DIMM with."""
    # <memoryBacking> of the domain makes the DIMM a memfd; but the DIMM needs its own access mode.
    memory = ET.Element("memory", model="dimm", access="shared")
    target = ET.SubElement(memory, "target")
    ET.SubElement(target, "size", unit="bytes").text = str(size_bytes)
    ET.SubElement(target, "node").text = str(node)
    return ET.tostring(memory, encoding="unicode")


def dimms_of(domain_xml: str) -> list[Dimm]:
    """Return the DIMMs in the live XML of a domain."""
    domain = ET.fromstring(domain_xml)  # noqa: S314 - libvirt's own
    return [
        Dimm(
            alias=memory.find("alias").attrib["name"],  # type: ignore[union-attr]
            address=int(memory.find("address").attrib["base"], 16),  # type: ignore[union-attr]
            size_bytes=int(memory.findtext("target/size") or 0) * KIB,  # KiB in live XML
            xml=ET.tostring(memory, encoding="unicode"),
        )
        for memory in domain.iterfind("devices/memory[@model='dimm']")
    ]

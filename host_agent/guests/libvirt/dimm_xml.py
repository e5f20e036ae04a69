"""DIMMs of a libvirt domain: values in, XML out, and back."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from hintfleet.ranges import RangeSet
from hintfleet.units import KIB, PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Dimm:
    """A DIMM that is plugged.

    :ivar alias: libvirt's name for it, which its events bear.
    :ivar address: first byte, guest physical.
    :ivar xml: what libvirt knows it by.
    """

    alias: str
    address: int
    size_bytes: int
    xml: str

    @property
    def pages(self) -> RangeSet:
        """The guest's page frames that it holds."""
        return RangeSet([(self.address // PAGE_BYTES, self.size_bytes // PAGE_BYTES)])


def dimm_xml(size_bytes: int, node: int) -> str:
    """The XML to plug a DIMM with; its memory is a shared memfd, as all of the domain's."""
    memory = ET.Element("memory", model="dimm", access="shared")
    target = ET.SubElement(memory, "target")
    ET.SubElement(target, "size", unit="bytes").text = str(size_bytes)
    ET.SubElement(target, "node").text = str(node)
    return ET.tostring(memory, encoding="unicode")


def dimms_of(domain_xml: str) -> list[Dimm]:
    """The DIMMs in the live XML of a domain."""
    domain = ET.fromstring(domain_xml)  # noqa: S314 - libvirt's own
    return [
        Dimm(
            alias=memory.find("alias").attrib["name"],  # type: ignore[union-attr]
            address=int(memory.find("address").attrib["base"], 16),  # type: ignore[union-attr]
            size_bytes=int(memory.findtext("target/size") or 0) * KIB,  # libvirt's unit here
            xml=ET.tostring(memory, encoding="unicode"),
        )
        for memory in domain.iterfind("devices/memory[@model='dimm']")
    ]

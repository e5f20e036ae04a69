"""The libvirt domain of a guest: values in, XML out.

What matters for hinting: the RAM is a shared memfd, so that the host agent can
punch holes in it; there is no balloon unless it is the method, for its free page
reporting would take the place of ours; a guest that resets or crashes ends, because
its epoch does.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hintfleet.agent_config import FW_CFG_NAME
from hintfleet.units import KIB, MIB
from host_agent.guests.balloon import PERIOD_S
from host_agent.guests.libvirt.image import GuestImage

NAME_PREFIX = "hintfleet-"


class Memballoon(Enum):
    """What the guest's balloon device is for."""

    NONE = "none"
    REPORTING = "reporting"
    TARGET = "target"


_DIMM_SLOTS = 32
"""Each time that a guest grows takes one, until it shrinks."""


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """What a domain is made from.

    :ivar accelerator: `kvm`, or `qemu` for TCG: the type of a libvirt domain.
    :ivar console: file that the guest's serial console is written to.
    :ivar config: file that the agent reads as FW_CFG_NAME; None for a guest
        without agent, which ends as soon as it has booted. Never text in the
        XML: that shows in QEMU's command line, and it holds a secret.
    :ivar max_memory_bytes: what DIMMs may make it; 0 if it has no slots for any.
    :ivar node_count: NUMA nodes that the memory is spread over evenly.
    :ivar parameters: more for the kernel's command line; hintfleet.* is for the guest's
        init (deploy/image/init).
    """

    name: str
    uuid: str
    accelerator: str
    memory_bytes: int
    image: GuestImage
    console: Path
    config: Path | None
    parameters: Sequence[str] = ()
    memballoon: Memballoon = Memballoon.NONE
    vcpu_count: int = 1
    max_memory_bytes: int = 0
    node_count: int = 1


def domain_xml(spec: DomainSpec) -> str:
    """The XML to create a transient domain from."""
    domain = ET.Element("domain", type=spec.accelerator)
    _text(domain, "name", NAME_PREFIX + spec.name)
    _text(domain, "uuid", spec.uuid)
    if spec.max_memory_bytes:
        slots = str(_DIMM_SLOTS)
        _text(domain, "maxMemory", str(spec.max_memory_bytes), unit="bytes", slots=slots)
    _text(domain, "memory", str(spec.memory_bytes), unit="bytes")
    _text(domain, "vcpu", str(spec.vcpu_count))
    _memory_backing(domain)
    _boot(domain, spec)
    _cpu(domain, spec)
    for event in ("poweroff", "reboot", "crash"):
        _text(domain, f"on_{event}", "destroy")
    _devices(domain, spec)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _memory_backing(domain: ET.Element) -> None:
    backing = ET.SubElement(domain, "memoryBacking")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")


def _cpu(domain: ET.Element, spec: DomainSpec) -> None:
    kvm = spec.accelerator == "kvm"
    nodes = spec.node_count > 1 or spec.max_memory_bytes  # DIMMs are plugged into a node
    if not kvm and not nodes:
        return
    cpu = ET.SubElement(domain, "cpu", {"mode": "host-passthrough"} if kvm else {})
    if nodes:
        numa = ET.SubElement(cpu, "numa")
        for node, size_bytes in enumerate(_node_sizes(spec)):
            cell = {"id": str(node), "memory": str(size_bytes // KIB), "unit": "KiB"}
            if not node:  # all of them: memory is what there is to spread
                cell["cpus"] = f"0-{spec.vcpu_count - 1}"
            ET.SubElement(numa, "cell", cell)


def _node_sizes(spec: DomainSpec) -> list[int]:
    """Whole MiB each; the last has the rest."""
    share_bytes = spec.memory_bytes // spec.node_count // MIB * MIB
    others = [share_bytes] * (spec.node_count - 1)
    return [*others, spec.memory_bytes - sum(others)]


def _boot(domain: ET.Element, spec: DomainSpec) -> None:
    if spec.config:
        sysinfo = ET.SubElement(domain, "sysinfo", type="fwcfg")
        ET.SubElement(sysinfo, "entry", name=FW_CFG_NAME, file=str(spec.config))
    os = ET.SubElement(domain, "os")
    _text(os, "type", "hvm", arch="x86_64", machine="q35")
    _text(os, "kernel", str(spec.image.kernel))
    _text(os, "initrd", str(spec.image.initrd))
    _text(os, "cmdline", " ".join((*_parameters(spec), *spec.parameters)))
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")


def _parameters(spec: DomainSpec) -> list[str]:
    # panic=-1: reset at once, which ends the domain.
    # no_timer_check: on a busy host a vCPU under TCG may not run for so long that the kernel counts
    # no tick, takes the timer for unconnected and hangs or panics ("MP-BIOS bug",
    # arch/x86/kernel/apic/io_apic.c: check_timer). Under KVM, Linux sets it by itself.
    parameters = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check"]
    if spec.max_memory_bytes:
        # DIMMs come above 4 GiB. For devices that cannot reach them (there are none here) the
        # kernel would set 64 MiB of bounce buffers aside (arch/x86/kernel/pci-dma.c).
        parameters.append("swiotlb=noforce")
    return parameters


def _devices(domain: ET.Element, spec: DomainSpec) -> None:
    devices = ET.SubElement(domain, "devices")
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw")
    # All guests share one file, so its owner and label are nobody's to change.
    source = ET.SubElement(disk, "source", file=str(spec.image.root_disk))
    ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.SubElement(disk, "readonly")
    # The guest reaches the host's loopback as 10.0.2.2, with no privileges.
    interface = ET.SubElement(devices, "interface", type="user")
    ET.SubElement(interface, "model", type="virtio")
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(spec.console))
    ET.SubElement(devices, "controller", type="usb", model="none")
    _balloon(devices, spec.memballoon)


def _balloon(devices: ET.Element, use: Memballoon) -> None:
    if use is Memballoon.NONE:
        ET.SubElement(devices, "memballoon", model="none")
    elif use is Memballoon.REPORTING:
        ET.SubElement(devices, "memballoon", model="virtio", freePageReporting="on")
    else:
        # autodeflate: a guest that runs out of memory takes it back without being asked.
        balloon = ET.SubElement(devices, "memballoon", model="virtio", autodeflate="on")
        ET.SubElement(balloon, "stats", period=str(round(PERIOD_S)))

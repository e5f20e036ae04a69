"""Builds the XML of a guest's libvirt domain from values. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hintfleet.agent_config import FW_CFG_NAME
from hintfleet.units import KIB, MIB
from host_agent.guests.balloon import PERIOD_S
from host_agent.guests.libvirt.devices import door_element
from host_agent.guests.libvirt.image import GuestImage

NAME_PREFIX = "hintfleet-"


class Memballoon(Enum):
    """The purpose of the guest's balloon device."""

    NONE = "none"
    REPORTING = "reporting"
    TARGET = "target"


# Each DIMM takes one slot while it is plugged; a guest gets a DIMM each time that it grows.
_DIMM_SLOTS = 32


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """The values that a domain's XML is built from.

    :ivar accelerator: type of the libvirt domain: `kvm`, or `qemu` for TCG.
    :ivar console: file that the guest's serial console is written to.
    :ivar config: file that the agent reads as FW_CFG_NAME; None for a guest without agent, which
        ends as soon as it has booted.
    :ivar door: socket of the memory door; None for a guest without one.
    :ivar max_memory_bytes: size that the guest may reach with DIMMs; 0 for no slots.
    :ivar node_count: number of NUMA nodes; the memory is spread over them evenly.
    :ivar partition: the cgroup that contains the domain; empty for libvirt's default.
    :ivar parameters: added to the kernel's command line; hintfleet.* is for the guest's init
        (deploy/image/init).
    """

    name: str
    uuid: str
    accelerator: str
    memory_bytes: int
    image: GuestImage
    console: Path
    config: Path | None
    door: Path | None
    parameters: Sequence[str] = ()
    memballoon: Memballoon = Memballoon.NONE
    vcpu_count: int = 1
    max_memory_bytes: int = 0
    node_count: int = 1
    partition: str = ""


def domain_xml(spec: DomainSpec) -> str:
    """Return the XML to create a transient domain from."""
    domain = ET.Element("domain", type=spec.accelerator)
    _text(domain, "name", NAME_PREFIX + spec.name)
    _text(domain, "uuid", spec.uuid)
    if spec.max_memory_bytes:
        slots = str(_DIMM_SLOTS)
        _text(domain, "maxMemory", str(spec.max_memory_bytes), unit="bytes", slots=slots)
    _text(domain, "memory", str(spec.memory_bytes), unit="bytes")
    _text(domain, "vcpu", str(spec.vcpu_count))
    if spec.partition:
        _text(ET.SubElement(domain, "resource"), "partition", spec.partition)
    _memory_backing(domain)
    _boot(domain, spec)
    _cpu(domain, spec)
    # A guest that resets or crashes must end, not boot again: the host agent treats it as lost.
    for event in ("poweroff", "reboot", "crash"):
        _text(domain, f"on_{event}", "destroy")
    _devices(domain, spec)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _memory_backing(domain: ET.Element) -> None:
    # A shared memfd: QEMU hands it over at the memory door, and the host agent punches holes in it.
    backing = ET.SubElement(domain, "memoryBacking")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")


def _cpu(domain: ET.Element, spec: DomainSpec) -> None:
    kvm = spec.accelerator == "kvm"
    # libvirt refuses <maxMemory> without NUMA nodes: a DIMM is plugged into a node.
    nodes = spec.node_count > 1 or spec.max_memory_bytes
    if not kvm and not nodes:
        return
    cpu = ET.SubElement(domain, "cpu", {"mode": "host-passthrough"} if kvm else {})
    if nodes:
        numa = ET.SubElement(cpu, "numa")
        for node, size_bytes in enumerate(_node_sizes(spec)):
            cell = {"id": str(node), "memory": str(size_bytes // KIB), "unit": "KiB"}
            # All virtual CPUs are in the first node: only the memory has to be spread.
            if not node:
                cell["cpus"] = f"0-{spec.vcpu_count - 1}"
            ET.SubElement(numa, "cell", cell)


def _node_sizes(spec: DomainSpec) -> list[int]:
    """Return the bytes of each node: equal shares of whole MiB; the last has the rest, too."""
    share_bytes = spec.memory_bytes // spec.node_count // MIB * MIB
    others = [share_bytes] * (spec.node_count - 1)
    return [*others, spec.memory_bytes - sum(others)]


def _boot(domain: ET.Element, spec: DomainSpec) -> None:
    # The configuration is passed as a file, not as text in the XML: text would show in QEMU's
    # command line, and the configuration contains the guest's token.
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
    # panic=-1: after a panic the kernel resets at once, which ends the domain.
    # no_timer_check: skips a check that may fail on a busy host, where a vCPU under TCG may stand
    # still for so long that the kernel counts no tick, takes the timer for unconnected and hangs or
    # panics ("MP-BIOS bug", arch/x86/kernel/apic/io_apic.c: check_timer). Under KVM, Linux sets
    # no_timer_check by itself.
    parameters = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check"]
    if spec.max_memory_bytes:
        # DIMMs are above 4 GiB. For devices that cannot reach them (there are none here) the
        # kernel would reserve 64 MiB of bounce buffers (arch/x86/kernel/pci-dma.c).
        parameters.append("swiotlb=noforce")
    return parameters


def _devices(domain: ET.Element, spec: DomainSpec) -> None:
    devices = ET.SubElement(domain, "devices")
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw")
    # relabel=no: all guests share this file. Else libvirt would change its owner for one guest, and
    # change it back when that guest ends, while others use it.
    source = ET.SubElement(disk, "source", file=str(spec.image.root_disk))
    ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.SubElement(disk, "readonly")
    # User-mode networking needs no privileges; the guest reaches the host's loopback as 10.0.2.2.
    interface = ET.SubElement(devices, "interface", type="user")
    ET.SubElement(interface, "model", type="virtio")
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(spec.console))
    ET.SubElement(devices, "controller", type="usb", model="none")
    if spec.door:
        devices.append(door_element(spec.door))
    _balloon(devices, spec.memballoon)


def _balloon(devices: ET.Element, use: Memballoon) -> None:
    # The element is always there: without it libvirt adds a balloon device by itself (model
    # "virtio" for QEMU), and then a guest of every method would have one.
    if use is Memballoon.NONE:
        ET.SubElement(devices, "memballoon", model="none")
    elif use is Memballoon.REPORTING:
        ET.SubElement(devices, "memballoon", model="virtio", freePageReporting="on")
    else:
        # autodeflate: a guest that runs out of memory takes some out of the balloon by itself.
        balloon = ET.SubElement(devices, "memballoon", model="virtio", autodeflate="on")
        ET.SubElement(balloon, "stats", period=str(round(PERIOD_S)))

"""Finds what keeps the free memory of a domain that somebody else made from being hinted.

Each obstacle has a text that says what to change. If a domain has no obstacle, QEMU can hand over
its memory at the memory door, and the host can drop that memory page by page. The domain's XML and
state are examined, and whether somebody listens on a door's socket; but not what runs in the guest,
which also needs hintfleet's agent and the driver virtiofs.
"""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hintfleet.errors import GuestLost, Refused
from hintfleet.units import KIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.door.door import BACKING_HINT
from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.devices import doors_in, is_served
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX

_COLD = ", then shut the domain down and start it again"


def obstacles(
    domain_xml: str, *, is_running: bool, is_suspended: bool = False, is_asleep: bool = False
) -> list[host_pb2.Obstacle]:
    """Return the obstacles that keep a domain from being hinted, in the order in which to remove
    them; an empty list if there are none.

    :param domain_xml: the live XML of a domain, or its persistent one if it does not run.
    :param is_suspended: whether its virtual CPUs are stopped.
    :param is_asleep: whether the guest has suspended itself to RAM (ACPI S3).
    """
    domain = ET.fromstring(domain_xml)  # noqa: S314 - libvirt's own
    found = [host_pb2.Obstacle(what=what, change=change) for what, change in _obstacles(domain)]
    name = shlex.quote(domain.findtext("name") or "")
    if not is_running:
        found.append(host_pb2.Obstacle(what="it does not run", change=f"virsh start {name}"))
    elif is_suspended:
        found.append(host_pb2.Obstacle(what="it is suspended", change=f"virsh resume {name}"))
    elif is_asleep:
        found.append(host_pb2.Obstacle(what="it sleeps", change=f"virsh dompmwakeup {name}"))
    return found


def _obstacles(domain: ET.Element) -> Iterator[tuple[str, str]]:
    if (domain.findtext("name") or "").startswith(NAME_PREFIX):
        yield "a host agent made it, and hints in it", "nothing"
        return
    if any(map(is_served, doors_in(domain))):
        yield "another host agent is attached to it", "detach it there"
    # Ignore doors of killed host agents, and count their ports as free: `AttachedDriver.create`
    # takes these doors out before it plugs in another one.
    if (devices := domain.find("devices")) is not None:
        for door in doors_in(domain):
            devices.remove(door)
    yield from _memory_obstacles(domain)
    yield from _device_obstacles(domain)


def _memory_obstacles(domain: ET.Element) -> Iterator[tuple[str, str]]:
    if domain.find("memoryBacking/hugepages") is not None:
        yield (
            "its memory is in huge pages, which cannot be dropped in part",
            f"remove <hugepages> from <memoryBacking>{_COLD}",
        )
    # libvirt gives the size in KiB.
    pages = domain.findall("devices/memory/source/pagesize")
    if any(page.text != str(PAGE_BYTES // KIB) for page in pages):
        yield (
            "a DIMM is in huge pages, which cannot be dropped in part",
            "detach it, and plug one without <pagesize>",
        )
    if domain.find("memoryBacking/locked") is not None:
        yield "its memory is locked", f"remove <locked/> from <memoryBacking>{_COLD}"
    source = domain.find("memoryBacking/source")
    if source is None or source.get("type") != "memfd" or not _is_shared(domain):
        yield "its memory is not in a shared memfd", BACKING_HINT + _COLD
    if domain.find("launchSecurity") is not None:
        yield "its memory is encrypted (<launchSecurity>)", f"remove <launchSecurity>{_COLD}"


def _is_shared(domain: ET.Element) -> bool:
    """Return whether all memory is shared. The access mode of a NUMA cell overrides the domain's,
    and that of a memory device (DIMM) overrides its cell's."""
    access = domain.find("memoryBacking/access")
    default = access.get("mode") if access is not None else None
    cells = {
        cell.get("id"): cell.get("memAccess", default) for cell in domain.findall("cpu/numa/cell")
    }
    dimms = [
        device.get("access", cells.get(device.findtext("target/node"), default))
        for device in domain.findall("devices/memory")
    ]
    return {*(cells.values() or [default]), *dimms} == {"shared"}


def _device_obstacles(domain: ET.Element) -> Iterator[tuple[str, str]]:
    assigned = [
        *domain.findall("devices/hostdev[@type='pci']"),
        *domain.findall("devices/hostdev[@type='mdev']"),
        *domain.findall("devices/interface[@type='hostdev']"),
        *domain.findall("devices/interface[@type='vdpa']"),
    ]
    if assigned:
        yield (
            "a device is assigned to it (VFIO), which goes on writing to memory that was dropped",
            "detach the device",
        )
    balloon = domain.find("devices/memballoon")
    if balloon is not None and balloon.get("freePageReporting") == "on":
        yield (
            "its balloon has free page reporting on, and a kernel has room for one reporter",
            f"remove freePageReporting='on' from <memballoon>{_COLD}",
        )
    if not _has_free_port(domain):
        yield (
            "it has no free PCIe port",
            f"add <controller type='pci' model='pcie-root-port'/>{_COLD}",
        )


def _has_free_port(domain: ET.Element) -> bool:
    """Return whether there is a free PCIe port; True without PCIe, where a free slot is assumed."""
    controllers = domain.findall("devices/controller[@type='pci']")
    if not any(one.get("model") == "pcie-root" for one in controllers):
        return True  # i440FX: its bus has 31 slots; one is assumed to be free
    ports = {
        one.get("index")
        for one in controllers
        if one.get("model") in ("pcie-root-port", "pcie-switch-downstream-port")
    }
    buses = (int(one.get("bus", "0"), 0) for one in domain.iterfind(".//address[@type='pci']"))
    return bool(ports - {str(bus) for bus in buses})


def refuse_if_any(domain: host_pb2.Domain) -> None:
    """Check that a domain has no obstacles.

    :raises Refused: it has some; names all, and what to change about the first.
    """
    if domain.obstacles:
        what = "; ".join(one.what for one in domain.obstacles)
        raise Refused(
            f"domain {domain.name} cannot be attached: {what}", hint=domain.obstacles[0].change
        )


def described(domain: Any) -> host_pb2.Domain | None:
    """Return a domain and its obstacles as a message of the control API; None if it is gone.

    :raises Refused: libvirt does not answer.
    """
    libvirt, _ = modules()
    with suppress(GuestLost), errors_as("looking at a domain"):
        is_running, state = bool(domain.isActive()), domain.state()[0]
        return host_pb2.Domain(
            name=domain.name(),
            uuid=domain.UUIDString(),
            running=is_running,
            memory_bytes=domain.maxMemory() * KIB,
            obstacles=obstacles(
                domain.XMLDesc(),
                is_running=is_running,
                is_suspended=state == libvirt.VIR_DOMAIN_PAUSED,
                is_asleep=state == libvirt.VIR_DOMAIN_PMSUSPENDED,
            ),
        )
    return None

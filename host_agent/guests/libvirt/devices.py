"""Detaches a device from a running domain, and waits until QEMU has removed it. Also builds the XML
of memory doors, finds them in a domain, and plugs and unplugs them. The device of a memory door
(door/door.py) is a virtiofs device that nobody mounts."""

from __future__ import annotations

import contextlib
import queue
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

from hintfleet.errors import OutcomeUnknown, Refused
from host_agent.guests.libvirt.api import errors_as, modules, quietly

# The mount tag of the memory door's device: nobody mounts it, but it marks the device as ours.
_TAG = "hintfleet"
# The size in libvirt's examples (docs/kbase/virtiofs.rst); the device's queues are never used.
_QUEUE_SIZE = "1024"

# How long to wait for a guest to release a device. A running guest needs milliseconds; a suspended
# guest does not release it at all.
_REMOVAL_S = 20.0

# How long a listener with a full backlog may make us wait.
_PROBE_S = 1.0
_LISTENING = "00010000"  # __SO_ACCEPTCON, include/uapi/linux/net.h


def door_element(path: Path) -> ET.Element:
    """Return the memory door's device, as an element for a domain's XML."""
    filesystem = ET.Element("filesystem", type="mount")
    ET.SubElement(filesystem, "driver", type="virtiofs", queue=_QUEUE_SIZE)
    ET.SubElement(filesystem, "source", socket=str(path))
    ET.SubElement(filesystem, "target", dir=_TAG)
    return filesystem


def doors_in(domain: ET.Element) -> list[ET.Element]:
    """Return the elements of memory doors in a domain's XML."""
    return domain.findall(f"devices/filesystem/target[@dir='{_TAG}']/..")


def is_served(door: ET.Element) -> bool:
    """Return whether somebody listens on the socket of this memory door; true if that cannot be
    found out. False, for example, if the host agent that plugged the door in was killed."""
    source = door.find("source")
    path = source.get("socket", "") if source is not None else ""
    if path in _listening_paths():
        return True
    # The kernel's list has only the sockets of this network namespace, so try to connect, too. If
    # the list has the path, do not connect: a served door from which QEMU has hung up would take
    # our connection for QEMU's.
    with socket(AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:  # for example, this user may not connect: assume that it is served
            pass
    return True


def _listening_paths() -> set[str]:
    # Fields of a line: address, references, protocol, flags, type, state, inode, path (proc(5)).
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    fields = (line.split(maxsplit=7) for line in lines)
    return {one[7] for one in fields if len(one) == 8 and one[3] == _LISTENING}


def plug_door(domain: Any, path: Path) -> None:
    """Plug a memory door into a running domain. QEMU connects to the socket before this returns,
    so somebody must listen there.

    :raises Refused: libvirt or QEMU failed. Most often nothing is plugged in then, but libvirt may
        fail after QEMU has plugged the device in.
    :raises GuestLost: the domain is gone.
    """
    libvirt, _ = modules()
    try:
        with errors_as("plugging the memory door"):
            xml = ET.tostring(door_element(path), encoding="unicode")
            domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except Refused as error:
        # libvirt before 9.2 forgets at a restart that memory is shared, unless the domain has a
        # NUMA cell (Red Hat's bug 2078693). A domain whose memory is not shared would have been
        # refused earlier (attached/obstacles.py).
        if "requires shared memory" in error.message:
            error.hint = (
                "libvirt was restarted, and has forgotten that the domain's memory is shared:"
                " shut the domain down and start it again, or use libvirt 9.2"
            )
        raise


def unplug_door(domain: Any) -> None:
    """Take all memory doors out of a domain; do nothing if it has none or does not run.

    :raises Refused: libvirt failed, or the guest refused to release a door.
    :raises OutcomeUnknown: the guest did not answer in time, and may still release the door.
    :raises GuestLost: the domain is gone.
    """
    for device in _doors(domain):
        name = _alias(device)
        try:
            detach(domain, name, ET.tostring(device, encoding="unicode"))
        except (Refused, OutcomeUnknown):
            # The device may be gone all the same, which is enough: the domain has ended
            # meanwhile, or somebody else has taken the device out.
            if name in map(_alias, _doors(domain)):
                raise


def _alias(device: ET.Element) -> str:
    alias = device.find("alias")
    return alias.attrib["name"] if alias is not None else _TAG


def _doors(domain: Any) -> list[ET.Element]:
    with errors_as("looking for the memory door"):
        if not domain.isActive():
            return []
        return doors_in(ET.fromstring(domain.XMLDesc()))  # noqa: S314 - libvirt's own


def detach(domain: Any, alias: str, xml: str) -> None:
    """Detach a device and wait until QEMU has removed it.

    :param alias: libvirt's name for the device: tells which events are about it.
    :param xml: the device's element of the live XML: tells libvirt what to detach.
    :raises Refused: the guest refused, and the device stays; or libvirt failed, for example because
        the device is gone already.
    :raises OutcomeUnknown: the guest did not answer in time, and may still release the device.
    :raises GuestLost: the domain is gone.
    """
    libvirt, _ = modules()
    # Subscribe before detaching: detachDeviceFlags returns when the guest has been asked, and
    # only an event tells what the guest did.
    with _removal_of(alias, domain) as removed:
        with errors_as(f"unplugging {alias}"):
            domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            was_removed = removed.get(timeout=_REMOVAL_S)
        except queue.Empty:
            raise OutcomeUnknown(
                f"the guest did not release {alias} within {_REMOVAL_S:g} s"
            ) from None
    if not was_removed:
        raise Refused(f"the guest refused to release {alias}")


@contextlib.contextmanager
def _removal_of(alias: str, domain: Any) -> Iterator[queue.SimpleQueue[bool]]:
    """Subscribe to libvirt's events about one device while the block runs. Yield a queue that gets
    True when QEMU has removed the device, or False when the guest has refused."""
    libvirt, _ = modules()
    results: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def on_event(_connection: Any, _domain: Any, removed: str, was_removed: bool) -> None:
        if removed == alias:
            results.put(was_removed)

    with contextlib.ExitStack() as undo, errors_as("subscribing to libvirt's events"):
        connection = domain.connect()
        for event, was_removed in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, True),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, False),
        ):
            number = connection.domainEventRegisterAny(domain, event, on_event, was_removed)
            # Quietly: if libvirtd has gone meanwhile, what the block raises tells more.
            undo.callback(quietly, connection.domainEventDeregisterAny, number)
        yield results

"""The device behind which the memory door is (door/door.py): a virtiofs device of a domain that
nobody mounts. Builds its XML, plugs it into a running domain and takes it out."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.removal import detach

TAG = "hintfleet"
"""The name under which the guest could mount it; marks the device as ours."""

# libvirt's default for virtiofs (src/qemu/qemu_command.c); the queue is never used.
_QUEUE_SIZE = "1024"


def door_element(socket: Path) -> ET.Element:
    """Return the device's element of a domain's XML."""
    filesystem = ET.Element("filesystem", type="mount")
    ET.SubElement(filesystem, "driver", type="virtiofs", queue=_QUEUE_SIZE)
    ET.SubElement(filesystem, "source", socket=str(socket))
    ET.SubElement(filesystem, "target", dir=TAG)
    return filesystem


def plug_door(domain: Any, socket: Path) -> None:
    """Plug the device into a running domain. QEMU connects to the socket meanwhile.

    :raises Refused: libvirt or QEMU refused; nothing is plugged.
    :raises GuestLost: the domain is gone.
    """
    libvirt, _ = modules()
    with errors_as("plugging the memory door"):
        xml = ET.tostring(door_element(socket), encoding="unicode")
        domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def unplug_door(domain: Any) -> None:
    """Take the device out of a running domain, if it is there.

    :raises Refused: the guest refused to release it.
    :raises OutcomeUnknown: the guest did not answer in time.
    :raises GuestLost: the domain is gone.
    """
    with errors_as("looking for the memory door"):
        devices = ET.fromstring(domain.XMLDesc()).iterfind("devices/filesystem")  # noqa: S314
    for device in devices:
        target = device.find("target")
        if target is not None and target.get("dir") == TAG:
            alias = device.find("alias")
            name = alias.attrib["name"] if alias is not None else TAG
            detach(domain, name, ET.tostring(device, encoding="unicode"))

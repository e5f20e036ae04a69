"""The balloon device of a running libvirt domain: a memory target, or free page reporting."""

from __future__ import annotations

import json
from typing import Any

from hintfleet.units import KIB
from host_agent.guests.balloon import BalloonStats
from host_agent.guests.libvirt.api import errors_as, modules

_REPORTING_FEATURE = "VIRTIO_BALLOON_F_REPORTING"


class LibvirtBalloon:
    """The memory target of a running domain."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def stats(self) -> BalloonStats:
        with errors_as("reading the guest's memory statistics"):
            said = self._domain.memoryStats()
        return BalloonStats(
            size_bytes=said["actual"] * KIB,
            unused_bytes=said["unused"] * KIB if "unused" in said else None,
            said_at_s=said.get("last_update", 0),
        )

    def set_target(self, size_bytes: int) -> None:
        libvirt, _ = modules()
        with errors_as("moving the guest's memory target"):
            self._domain.setMemoryFlags(size_bytes // KIB, libvirt.VIR_DOMAIN_AFFECT_LIVE)


class LibvirtReporting:
    """The free page reporting of a running domain."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def problem(self) -> str:
        """What the guest's driver has agreed on with QEMU says it: x-query-virtio-status, which
        came with QEMU 7.2 and is not promised to stay. Of another QEMU nothing is known."""
        libvirt, libvirt_qemu = modules()

        def ask(command: str, **arguments: str) -> Any:
            query = json.dumps({"execute": command, "arguments": arguments})
            return json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, query, 0))["return"]

        with errors_as("asking QEMU for the guest's balloon driver"):
            try:
                devices = ask("x-query-virtio")
                path = next(one["path"] for one in devices if one["name"] == "virtio-balloon")
                said = ask("x-query-virtio-status", path=path)
                status = said["status"]["statuses"]
                features = said["guest-features"]["dev-features"]
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise
                return ""
            except (KeyError, StopIteration):
                return ""
        return reporting_problem(status, features)


def reporting_problem(status: list[str], features: list[str]) -> str:
    """Why a guest does not report, by its driver's status and the features that it took. Pure.

    Each begins with a name of the virtio specification's and goes on with what it means.
    """
    if not any(line.startswith("VIRTIO_CONFIG_S_DRIVER_OK") for line in status):
        return "it has no driver for its balloon device (Linux: virtio_balloon)"
    if not any(line.startswith(_REPORTING_FEATURE) for line in features):
        return "its balloon driver has no free page reporting (Linux: 5.7 or newer)"
    return ""

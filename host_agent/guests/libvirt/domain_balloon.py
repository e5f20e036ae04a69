"""The balloon device of a libvirt domain, used for a memory target or free page reporting."""

from __future__ import annotations

import json
from typing import Any

from hintfleet.units import KIB
from host_agent.guests.balloon import BalloonStats
from host_agent.guests.libvirt.api import errors_as, modules

_REPORTING_FEATURE = "VIRTIO_BALLOON_F_REPORTING"


class LibvirtBalloon:
    """The balloon of a running domain, with its memory target."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def stats(self) -> BalloonStats:
        with errors_as("reading the guest's memory statistics"):
            stats = self._domain.memoryStats()
        # "actual" comes from QEMU. Until the guest's balloon driver has sent statistics, "unused"
        # is missing, and "last_update" is missing or 0.
        return BalloonStats(
            size_bytes=stats["actual"] * KIB,
            unused_bytes=stats["unused"] * KIB if "unused" in stats else None,
            last_update_s=stats.get("last_update", 0),
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
        """Return why the guest does not report free pages; empty if it does, or if QEMU does not
        show whether it does."""
        # A guest reports if its balloon driver has accepted _REPORTING_FEATURE. QEMU 7.2 and newer
        # show the accepted features, by a command that QEMU calls unstable (qapi/virtio.json).
        libvirt, libvirt_qemu = modules()

        def ask(command: str, **arguments: str) -> Any:
            query = json.dumps({"execute": command, "arguments": arguments})
            return json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, query, 0))["return"]

        with errors_as("asking QEMU for the guest's balloon driver"):
            try:
                devices = ask("x-query-virtio")
                path = next(one["path"] for one in devices if one["name"] == "virtio-balloon")
                answer = ask("x-query-virtio-status", path=path)
                status = answer["status"]["statuses"]
                features = answer["guest-features"]["dev-features"]
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise
                return ""
            except (KeyError, StopIteration):
                return ""
        return reporting_problem(status, features)


def reporting_problem(status: list[str], features: list[str]) -> str:
    """Return why a guest does not report free pages; empty if it does. Pure.

    :param status, features: the driver's status bits and accepted features, as QEMU lists them:
        each is a name from Linux's virtio headers, followed by its meaning.
    """
    if not any(line.startswith("VIRTIO_CONFIG_S_DRIVER_OK") for line in status):
        return "it has no driver for its balloon device (Linux: virtio_balloon)"
    if not any(line.startswith(_REPORTING_FEATURE) for line in features):
        return "its balloon driver has no free page reporting (Linux: 5.7 or newer)"
    return ""

"""Finds out whether guests boot under KVM on this host.

A /dev/kvm that can be opened proves little: under some nested hypervisors a stock kernel hangs.
So a guest is booted once (by driver.py), and the result is stored beside the images. The result is
used until the host reboots, or the guest's kernel or the owner or mode of /dev/kvm changes; a no is
used for an hour at most, because the host may just have been busy. Nothing is stored if the guest
could not be started. Without access to /dev/kvm the answer is no, and no guest is booted to find
out.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

from host_agent.guests.libvirt.image import GuestImage

# The first line that the guest's init writes to the console (deploy/image/init).
BOOTED = "hintfleet-init: started"

# Thirty times what a boot to init takes under KVM. A wrong no would cost a busy host more than so
# long a wait: guests would run under TCG.
TIMEOUT_S = 30.0

_NO_LASTS_S = 3600.0

_DEVICE = Path("/dev/kvm")
_POLL_S = 0.05


def cached(image: GuestImage) -> bool | None:
    """Return whether guests boot under KVM: false if this process may not use /dev/kvm, else the
    result of an earlier probe; None if there is no result that is still valid."""
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return False
    with contextlib.suppress(OSError, ValueError):
        cache = _cache(image)
        found = json.loads(cache.read_text())
        if isinstance(found, dict) and found.get("for") == _key(image):
            if found.get("boots") is True:
                return True
            if time.time() < cache.stat().st_mtime + _NO_LASTS_S:
                return False
    return None


def remember(image: GuestImage, boots: bool) -> None:
    """Store the result of a probe beside the images; do nothing if the file cannot be written."""
    with contextlib.suppress(OSError):
        cache = _cache(image)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as aside:
            json.dump({"for": _key(image), "boots": boots}, aside)
        Path(aside.name).replace(cache)


def wait_for_boot(console: Path) -> bool:
    """Wait until the guest that writes to `console` reaches its init, for TIMEOUT_S at most; return
    whether it did."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError):
            if BOOTED in console.read_text(errors="replace"):
                return True
        time.sleep(_POLL_S)
    return False


def _cache(image: GuestImage) -> Path:
    return image.directory.parent / "kvm-probe.json"


def _key(image: GuestImage) -> list[str | int]:
    """Return all that the result of a probe depends on."""
    # The owner and mode of /dev/kvm decide whether QEMU may open it.
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    device = _DEVICE.stat()
    return [boot_id, image.kernel_release, device.st_mode, device.st_uid, device.st_gid]

"""What the guest's kernel says of its memory and of this process."""

from __future__ import annotations

import os
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.units import KIB


def boot_id() -> str:
    """The id of this boot, random for each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def mem_free_bytes() -> int:
    """Memory that nobody uses, not even as a cache."""
    return _meminfo("MemFree")


def mem_total_bytes() -> int:
    """Memory that the kernel manages, whatever it is used for now."""
    return _meminfo("MemTotal")


def own_rss_bytes() -> int:
    """Resident memory of this process."""
    return _kib_field("/proc/self/status", "VmRSS")


def _meminfo(key: str) -> int:
    return _kib_field("/proc/meminfo", key)


def _kib_field(path: str, key: str) -> int:
    with open(path) as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * KIB
    raise Refused(f"{path} has no {key}")


def init_on_alloc() -> bool:
    """Whether the kernel zeroes pages as it hands them out (mm/mm_init.c says so at boot).

    True where it cannot be found out: the safe assumption.
    """
    parameters = Path("/proc/cmdline").read_text().split()
    for parameter in reversed(parameters):
        if parameter.startswith("init_on_alloc="):
            return parameter.partition("=")[2].lower() in ("1", "y", "yes", "on")
    said = [line for line in _kernel_log() if "mem auto-init:" in line]
    return not said or "heap alloc:on" in said[0]


def _kernel_log() -> list[str]:
    """The kernel's ring buffer, as far as it may be read."""
    lines = []
    try:
        with open("/dev/kmsg", "rb", buffering=0, opener=_open_nonblocking) as log:
            while record := log.read(8192):
                lines.append(record.decode(errors="replace"))
    except OSError:  # not root, or a record was overwritten while it was read
        pass
    return lines


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)

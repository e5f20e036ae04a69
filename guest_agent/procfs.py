"""What the guest's kernel says of its memory and of this process."""

from __future__ import annotations

from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.units import KIB


def boot_id() -> str:
    """The id of this boot, random for each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def mem_free_bytes() -> int:
    """Memory that nobody uses, not even as a cache."""
    return _meminfo("MemFree")


def mem_available_bytes() -> int:
    """Memory that programs can have without swapping."""
    return _meminfo("MemAvailable")


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

"""Reads what the guest's kernel reports: its boot id, its memory, whether it zeroes pages, and the
memory of this process."""

from __future__ import annotations

import os
import re

from hintfleet.errors import Refused
from hintfleet.units import KIB, PAGE_BYTES


def boot_id() -> str:
    """Return the id of this boot; each boot has a random one."""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def mem_free_bytes() -> int:
    """Return the memory that nobody uses, not even as a cache."""
    # sysconf uses sysinfo(2), not /proc/meminfo: this function is called every second or two, even
    # in an idle guest, and one system call is cheaper than reading and parsing a file.
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def mem_used_pages() -> int:
    """Return how many pages are not free: in use, as a cache too, or isolated."""
    return os.sysconf("SC_PHYS_PAGES") - os.sysconf("SC_AVPHYS_PAGES")


def mem_total_bytes() -> int:
    """Return the memory that the kernel manages, whatever it is used for now."""
    return _meminfo("MemTotal")


def mem_available_bytes() -> int:
    """Return how much memory can be allocated without swapping, as the kernel estimates it: free
    memory and most of the caches, minus reserves."""
    return _meminfo("MemAvailable")


def own_rss_bytes() -> int:
    """Return the resident memory of this process."""
    return _kib_field("/proc/self/status", "VmRSS")


def _meminfo(key: str) -> int:
    return _kib_field("/proc/meminfo", key)


def _kib_field(path: str, key: str) -> int:
    return parse_kib(_read(path), key, path)


def parse_kib(text: bytes, key: str, path: str) -> int:
    """Find the line `key: N kB` in `text`, and return N kB in bytes.

    :param path: where `text` was read, for the message.
    :raises Refused: `text` has no such line.
    """
    rest = (b"\n" + text).partition(f"\n{key}:".encode())[2]
    found = re.match(rb"[ \t]+([0-9]{1,15}) kB\n", rest)
    if not found:
        raise Refused(f"{path} has no {key}")
    return int(found[1]) * KIB


def _read(path: str) -> bytes:
    """Read a small file of /proc, which the kernel returns whole with one read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def init_on_alloc() -> bool:
    """Return whether the kernel zeroes pages when it allocates them; True if unknown."""
    # If unknown, True is safe: memory that the kernel has zeroed is resident, so it must be hinted
    # again.
    return _auto_init("alloc", if_unknown=True)


def init_on_free() -> bool:
    """Return whether the kernel zeroes pages when they are freed; False if unknown."""
    # If unknown, False: by default, kernels do not zero freed pages. A wrong False loses no data,
    # only savings: the hinted pages become resident again.
    return _auto_init("free", if_unknown=False)


def _auto_init(when: str, *, if_unknown: bool) -> bool:
    parameters = _read("/proc/cmdline").decode(errors="replace").split()
    for parameter in reversed(parameters):  # of a repeated parameter, the last one counts
        if parameter.startswith(f"init_on_{when}="):
            return parameter.partition("=")[2].lower() in ("1", "y", "yes", "on")
    # Without a parameter, the kernel's build configuration decides; the kernel logs its setting at
    # boot as "mem auto-init: ..." (mm/mm_init.c: report_meminit).
    lines = [line for line in _kernel_log() if "mem auto-init:" in line]
    return f"heap {when}:on" in lines[0] if lines else if_unknown


def _kernel_log() -> list[str]:
    """Return the records of the kernel's log, up to the first one that cannot be read."""
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

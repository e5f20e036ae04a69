"""Reads what the guest's kernel reports about its memory and about this process."""

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
    # sysinfo(2), not /proc/meminfo: this is called once a second in an idle guest, too, and one
    # system call is cheaper than reading and parsing a file.
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def mem_total_bytes() -> int:
    """Return the memory that the kernel manages, whatever it is used for now."""
    return _meminfo("MemTotal")


def mem_available_bytes() -> int:
    """Return the memory that can be allocated without swapping: free, and caches, less the
    watermarks."""
    return _meminfo("MemAvailable")


def own_rss_bytes() -> int:
    """Return the resident memory of this process."""
    return _kib_field("/proc/self/status", "VmRSS")


def _meminfo(key: str) -> int:
    return _kib_field("/proc/meminfo", key)


def _kib_field(path: str, key: str) -> int:
    return parse_kib(_read(path), key, path)


def parse_kib(text: bytes, key: str, path: str) -> int:
    """Return the bytes of the line `key: N kB`.

    :param path: where `text` was read, for the message.
    :raises Refused: `text` has no such line.
    """
    rest = (b"\n" + text).partition(f"\n{key}:".encode())[2]
    found = re.match(rb"[ \t]+([0-9]{1,15}) kB\n", rest)
    if not found:
        raise Refused(f"{path} has no {key}")
    return int(found[1]) * KIB


def _read(path: str) -> bytes:
    """Read a file of /proc that the kernel returns with one read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def init_on_alloc() -> bool:
    """Return whether the kernel zeroes pages when it allocates them; True if unknown."""
    # True is the safe assumption: what is zeroed is resident, and must be hinted again.
    return _auto_init("alloc", if_unknown=True)


def init_on_free() -> bool:
    """Return whether the kernel zeroes pages when they are freed; False if unknown."""
    # It is not the default. A wrong False loses no data: hinted pages become resident again, so
    # hinting them was in vain.
    return _auto_init("free", if_unknown=False)


def _auto_init(when: str, *, if_unknown: bool) -> bool:
    parameters = _read("/proc/cmdline").decode().split()
    for parameter in reversed(parameters):  # the last one wins
        if parameter.startswith(f"init_on_{when}="):
            return parameter.partition("=")[2].lower() in ("1", "y", "yes", "on")
    # Without a parameter, the kernel's configuration decides; the kernel logs it at boot as
    # "mem auto-init: ..." (mm/mm_init.c: report_meminit).
    lines = [line for line in _kernel_log() if "mem auto-init:" in line]
    return f"heap {when}:on" in lines[0] if lines else if_unknown


def _kernel_log() -> list[str]:
    """Return the records of the kernel's log that this process may read."""
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

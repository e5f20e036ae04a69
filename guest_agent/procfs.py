"""What the guest's kernel says of its memory and of this process."""

from __future__ import annotations

import os
import re

from hintfleet.errors import Refused
from hintfleet.units import KIB, PAGE_BYTES


def boot_id() -> str:
    """The id of this boot, random for each."""
    return _read("/proc/sys/kernel/random/boot_id").decode().strip()


def mem_free_bytes() -> int:
    """Memory that nobody uses, not even as a cache: sysinfo(2). Asked for once a second, in an
    idle guest too."""
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def mem_total_bytes() -> int:
    """Memory that the kernel manages, whatever it is used for now."""
    return _meminfo("MemTotal")


def mem_available_bytes() -> int:
    """What could be had without swapping, beyond the watermarks: free, and caches."""
    return _meminfo("MemAvailable")


def own_rss_bytes() -> int:
    """Resident memory of this process."""
    return _kib_field("/proc/self/status", "VmRSS")


def _meminfo(key: str) -> int:
    return _kib_field("/proc/meminfo", key)


def _kib_field(path: str, key: str) -> int:
    return parse_kib(_read(path), key, path)


def parse_kib(text: bytes, key: str, path: str) -> int:
    """Bytes of the line `key: N kB`.

    :raises Refused: there is none in `text`, which is that of `path`.
    """
    rest = (b"\n" + text).partition(f"\n{key}:".encode())[2]
    found = re.match(rb"[ \t]+([0-9]{1,15}) kB\n", rest)
    if not found:
        raise Refused(f"{path} has no {key}")
    return int(found[1]) * KIB


def _read(path: str) -> bytes:
    """A file of /proc that is given in one piece."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def init_on_alloc() -> bool:
    """Whether the kernel zeroes pages as it hands them out (mm/mm_init.c says so at boot).

    True where it cannot be found out: the safe assumption.
    """
    return _auto_init("alloc", if_unknown=True)


def init_on_free() -> bool:
    """Whether the kernel zeroes pages as they are freed. False where it cannot be found out:
    it is not the default, and costs nothing but effort."""
    return _auto_init("free", if_unknown=False)


def _auto_init(when: str, *, if_unknown: bool) -> bool:
    parameters = _read("/proc/cmdline").decode().split()
    for parameter in reversed(parameters):
        if parameter.startswith(f"init_on_{when}="):
            return parameter.partition("=")[2].lower() in ("1", "y", "yes", "on")
    said = [line for line in _kernel_log() if "mem auto-init:" in line]
    return f"heap {when}:on" in said[0] if said else if_unknown


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

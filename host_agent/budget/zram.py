"""Swap in compressed memory (zram), to which the kernel moves pages of the guests: what people use
who do not hint.

A device has a label of ours, and its maker holds a lock on it: so what a killed host agent left can
be told apart. Sources: Documentation/admin-guide/blockdev/zram.rst; for the header that mkswap(8)
writes, union swap_header of include/linux/swap.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.system.file_lock import is_held, lock_file
from hintfleet.units import PAGE_BYTES

_CONTROL = Path("/sys/class/zram-control")
_BLOCKS = Path("/sys/block")
_LABEL = b"hintfleet"
# 1024 bytes for a boot sector; version, last page, number of bad pages; a UUID, the label. The
# signature is at the end of the first page.
_HEADER = struct.Struct("=1024xIII16x16s")
_SIGNATURE = b"SWAPSPACE2"


class Zram:
    """A zram device that is used as swap. Make it with `make`, and end it with `remove`."""

    def __init__(self, device: Path, size_bytes: int, lock_fd: int) -> None:
        """:param lock_fd: holds the lock on the device; owned by this object."""
        self.size_bytes = size_bytes
        self._device = device
        self._lock_fd: int | None = lock_fd

    @classmethod
    def make(cls, size_bytes: int) -> Zram:
        """Make a device for `size_bytes` of pages, and swap on it. Before, remove those that killed
        host agents left. After a failure nothing is left.

        :raises Refused: this process may not, or the kernel has no zram.
        """
        for device in abandoned():
            remove(device)
        try:
            number = int((_CONTROL / "hot_add").read_text())
        except FileNotFoundError as error:
            raise Refused("this kernel has no zram", hint="modprobe zram") from error
        except OSError as error:
            raise Refused(f"no zram device can be made: {error}") from error
        device = Path(f"/dev/zram{number}")
        try:
            return cls(device, size_bytes, _swapped_on(device, size_bytes))
        except OSError as error:
            _forget(device)
            raise Refused(f"{device} cannot be used as swap: {error}") from error

    @property
    def used_bytes(self) -> int:
        """The memory that the device takes, for compressed pages and for itself."""
        # The third field of mm_stat: mem_used_total.
        return int((_BLOCKS / self._device.name / "mm_stat").read_text().split()[2])

    def remove(self) -> None:
        """Move what is swapped out back into memory, and remove the device. May be called twice.

        If the kernel refuses, the device is left, for `hintfleet doctor --clean`.
        """
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
            with contextlib.suppress(OSError):
                remove(self._device)


def abandoned() -> Iterator[Path]:
    """Yield the devices whose host agents are gone; nothing for a user who may not read devices."""
    for block in sorted(_BLOCKS.glob("zram*")):
        device = Path("/dev", block.name)
        with contextlib.suppress(OSError):
            if _is_ours(device) and not is_held(device):
                yield device


def _swapped_on(device: Path, size_bytes: int) -> int:
    """Swap on a new device; return the descriptor that holds its lock."""
    _write(_BLOCKS / device.name / "disksize", str(size_bytes))
    if not device.is_block_device():
        raise FileNotFoundError(errno.ENOENT, "no such device", str(device))
    # Locked before it has our label: another host agent must not take it for an abandoned one.
    fd = lock_file(device)
    if fd is None:
        raise BlockingIOError(errno.EBUSY, "somebody else uses the new device", str(device))
    try:
        os.pwrite(fd, _header(size_bytes), 0)
        os.fsync(fd)
        _call("swapon", device, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def remove(device: Path) -> None:
    """Swap off a device, and remove it.

    :raises OSError: the kernel refused.
    """
    # EINVAL: it is not swapped on.
    with contextlib.suppress(OSError):
        _call("swapoff", device)
    _forget(device)


def _forget(device: Path) -> None:
    _write(_BLOCKS / device.name / "reset", "1")
    _write(_CONTROL / "hot_remove", device.name.removeprefix("zram"))


def _header(size_bytes: int) -> bytes:
    start = _HEADER.pack(1, size_bytes // PAGE_BYTES - 1, 0, _LABEL)
    return start.ljust(PAGE_BYTES - len(_SIGNATURE), b"\0") + _SIGNATURE


def _is_ours(device: Path) -> bool:
    with device.open("rb") as file:
        start = file.read(_HEADER.size)
    # A device without a size has no bytes.
    return len(start) == _HEADER.size and _HEADER.unpack(start)[3].rstrip(b"\0") == _LABEL


def _call(name: str, device: Path, *flags: int) -> None:
    """Call swapon(2) or swapoff(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(os.fsencode(device), *flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(device))


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)

"""Swap in compressed memory (zram), to which the kernel moves pages of the guests: a common
alternative to hinting.

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
import time
from collections.abc import Iterator
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.system.file_lock import is_held, lock_file
from hintfleet.system.files import write_kernel_file
from hintfleet.units import MIB, PAGE_BYTES

_CONTROL = Path("/sys/class/zram-control")
_BLOCKS = Path("/sys/block")
_LABEL = b"hintfleet"
# 1024 bytes for a boot sector; version, last page, number of bad pages; a UUID, the label. The
# signature is at the end of the first page.
_HEADER = struct.Struct("=1024xIII16x16s")
_SIGNATURE = b"SWAPSPACE2"
# SWAP_FLAG_PREFER, and the highest priority: else the kernel would first use other swap, if there
# is any, which does not count into the budget (swapon(2)).
_HIGHEST_PRIORITY = 0x8000 | 0x7FFF
_MOST_BYTES = 1 << 40
_REMOVE_TIMEOUT_S = 5.0
_POLL_S = 0.05


class Zram:
    """A zram device that is used as swap. Make it with `make`, and end it with `remove`."""

    def __init__(self, device: Path, size_bytes: int, lock_fd: int) -> None:
        """:param lock_fd: holds the lock on the device; owned by this object."""
        self.size_bytes = size_bytes
        self._device = device
        self._lock_fd: int | None = lock_fd

    @classmethod
    def make(cls, size_bytes: int) -> Zram:
        """Make a device for `size_bytes` of pages, and have the kernel use it as swap, before all
        other swap. First remove the devices that killed host agents left. After a failure, no new
        swap is left.

        :raises Refused: the size is too small or too large, this process may not, or the kernel has
            no zram.
        """
        if not MIB <= size_bytes <= _MOST_BYTES:
            raise Refused(f"zram of {size_bytes} bytes: it must be 1 MiB to 1 TiB")
        for device in abandoned():
            with contextlib.suppress(OSError):  # left for `hintfleet doctor`
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
            with contextlib.suppress(OSError):
                _forget(device)
            raise Refused(f"{device} cannot be used as swap: {error}") from error

    @property
    def used_bytes(self) -> int:
        """The memory that the device takes: for compressed pages, and for its table of pages."""
        # The third field of mm_stat, mem_used_total, is without the table, which has 16 bytes for
        # each page (struct zram_table_entry of drivers/block/zram/zram_drv.h).
        statistics = (_BLOCKS / self._device.name / "mm_stat").read_text().split()
        return int(statistics[2]) + self.size_bytes // PAGE_BYTES * 16

    def remove(self) -> None:
        """Move what is swapped out back into memory, and remove the device. May be called twice.

        If the kernel refuses, the device is left, for `hintfleet doctor --clean`.
        """
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                _end(self._device, fd)


def abandoned() -> Iterator[Path]:
    """Yield the devices whose host agents are gone; nothing for a user who may not read devices."""
    for block in sorted(_BLOCKS.glob("zram*")):
        device = Path("/dev", block.name)
        with contextlib.suppress(OSError):
            if _is_ours(device) and not is_held(device):
                yield device


def _swapped_on(device: Path, size_bytes: int) -> int:
    """Have the kernel use a new device as swap; return the descriptor that holds its lock."""
    write_kernel_file(_BLOCKS / device.name / "disksize", str(size_bytes))
    if not device.is_block_device():
        raise FileNotFoundError(errno.ENOENT, "no such device", str(device))
    # Locked before it has our label: another host agent must not take it for an abandoned one.
    fd = lock_file(device)
    if fd is None:
        raise BlockingIOError(errno.EBUSY, "somebody else uses the new device", str(device))
    try:
        os.pwrite(fd, _header(size_bytes), 0)
        os.fsync(fd)
        _call("swapon", device, _HIGHEST_PRIORITY)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove(device: Path) -> None:
    """Swap off an abandoned device, and remove it; do nothing if it is not abandoned any more.

    :raises OSError: the kernel refused.
    """
    if not device.exists() or (fd := lock_file(device)) is None:
        return
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        if _is_ours(device):
            undo.pop_all()
            _end(device, fd)


def _end(device: Path, lock_fd: int) -> None:
    """Swap off a device, and remove it. Close the descriptor, which holds its lock, in any case.

    :raises OSError: the kernel refused; the device keeps our label.
    """
    try:
        _swap_off(device)
        # Erase the label before the lock is released: nobody else must take the device for an
        # abandoned one, and then remove the next device, which has the same name.
        os.pwrite(lock_fd, bytes(_HEADER.size), 0)
    finally:
        os.close(lock_fd)
    try:
        _forget(device)
    except OSError:
        with contextlib.suppress(OSError), device.open("r+b") as file:
            file.write(_HEADER.pack(1, 0, 0, _LABEL))
        raise


def _swap_off(device: Path) -> None:
    while True:
        try:
            return _call("swapoff", device)
        except InterruptedError:  # by a signal; Python retries only its own calls (PEP 475)
            continue
        except OSError as error:
            if error.errno == errno.EINVAL:  # it is not swapped on
                return None
            raise


def _forget(device: Path) -> None:
    """Remove a device that is not swapped on; that frees its memory."""
    give_up_s = time.monotonic() + _REMOVE_TIMEOUT_S
    while True:
        try:
            return write_kernel_file(_CONTROL / "hot_remove", device.name.removeprefix("zram"))
        except OSError as error:
            # EBUSY: somebody has the device open, for example udev or `hintfleet doctor`.
            if error.errno != errno.EBUSY or time.monotonic() > give_up_s:
                raise
            time.sleep(_POLL_S)


def _header(size_bytes: int) -> bytes:
    start = _HEADER.pack(1, size_bytes // PAGE_BYTES - 1, 0, _LABEL)
    return start.ljust(PAGE_BYTES - len(_SIGNATURE), b"\0") + _SIGNATURE


def _is_ours(device: Path) -> bool:
    with device.open("rb") as file:
        start = file.read(_HEADER.size)
    # From a device whose size is not set yet, read() returns no bytes: it is not ours.
    return len(start) == _HEADER.size and _HEADER.unpack(start)[3].rstrip(b"\0") == _LABEL


def _call(name: str, device: Path, *flags: int) -> None:
    """Call swapon(2) or swapoff(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(os.fsencode(device), *flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(device))

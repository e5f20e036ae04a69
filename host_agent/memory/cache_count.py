"""Counts how much of a part of a shmem file is data (in memory or swapped out), by cachestat(2).

cachestat(2) takes 13 ns for each page of data, and stops at the end of the part. The other way to
learn whether a part is all data, SEEK_HOLE of lseek(2), takes 28 ns for each page and does not stop
at the end of the part: it walks on to the next hole, however far that is.
"""

from __future__ import annotations

import ctypes
import os

from hintfleet.units import PAGE_BYTES

# The number of the system call on x86-64 and arm64 (include/uapi/asm-generic/unistd.h).
_CACHESTAT = 451


class _Range(ctypes.Structure):
    """struct cachestat_range of include/uapi/linux/mman.h."""

    _fields_ = [("off", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    """struct cachestat of include/uapi/linux/mman.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("nr_cache", "nr_dirty", "nr_writeback", "nr_evicted", "nr_recently_evicted")
    ]


_syscall = ctypes.CDLL(None, use_errno=True).syscall


def cached_bytes(fd: int, offset_bytes: int, size_bytes: int) -> int:
    """Return how many bytes of this part of a shmem file are data, in memory or swapped out; 0 if
    the kernel refuses the call."""
    where, counts = _Range(offset_bytes, size_bytes), _Counts()
    # The call fails before Linux 6.5 (ENOSYS), and where a container's seccomp filter denies it.
    if _syscall(_CACHESTAT, fd, ctypes.byref(where), ctypes.byref(counts), 0):
        return 0
    # A page of shmem that is swapped out is counted as evicted (mm/filemap.c: filemap_cachestat).
    return int(counts.nr_cache + counts.nr_evicted) * PAGE_BYTES


def _can_count() -> bool:
    fd = os.memfd_create("hintfleet-count")
    try:
        os.pwrite(fd, b"x", 0)
        return cached_bytes(fd, 0, PAGE_BYTES) == PAGE_BYTES
    finally:
        os.close(fd)


CAN_COUNT = _can_count()  # tried, not inferred from the kernel's version: a filter may deny it

"""Punches many holes into a file: `punch` is the loop of punch.c if it was compiled, else a loop in
Python.

punch.c is compiled when the package is built or installed, if there is a compiler (hatch_build.py).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable
from ctypes import c_int64
from pathlib import Path

from host_agent.memory.fence import FenceClosed

Punch = Callable[[int, "array[int]", "array[int]", c_int64, int], None]
"""Drop the memory behind ranges of a file. Parameters: the file's descriptor, the ranges' offsets
and their lengths, both in bytes and of type "q"; `closed_times` of a fence and a permit for it,
which are compared before each range.

:raises OSError: the kernel refused a range; those before it have been dropped.
:raises FenceClosed: the permit has ended; ranges before may have been dropped.
"""

# FALLOC_FL_PUNCH_HOLE, which must be combined with FALLOC_FL_KEEP_SIZE (fallocate(2),
# include/uapi/linux/falloc.h). Python's os.posix_fallocate cannot be used: it has no flags.
_PUNCH_HOLE = 0x02 | 0x01


def loop_in_c(library: Path) -> Punch:
    """Return a function that calls the loop of punch.c.

    :raises OSError: the library was not built, or not for this machine, or does not have the loop.
    """
    try:
        loop = ctypes.CDLL(str(library)).punch_while_permitted
    except AttributeError as error:
        raise OSError(f"{library} was built from an older punch.c") from error
    array_of, counter = ctypes.c_void_p, ctypes.POINTER(c_int64)
    loop.argtypes = (ctypes.c_int, array_of, array_of, ctypes.c_size_t, counter, c_int64)

    def punch(
        fd: int, offsets: array[int], lengths: array[int], closed_times: c_int64, permit: int
    ) -> None:
        begins, sizes = offsets.buffer_info()[0], lengths.buffer_info()[0]
        code = loop(fd, begins, sizes, len(offsets), closed_times, permit)
        if code:
            raise FenceClosed if code < 0 else _refused(code)

    return punch


def loop_in_ctypes() -> Punch:
    """Return a loop that calls fallocate(2) through ctypes for each range."""
    # With this loop, a batch took 1 % to 5 % longer than with the loop in C (docs/measurements.md).
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, c_int64, c_int64)

    def punch(
        fd: int, offsets: array[int], lengths: array[int], closed_times: c_int64, permit: int
    ) -> None:
        for offset, length in zip(offsets, lengths, strict=True):
            if closed_times.value != permit:
                raise FenceClosed
            if fallocate(fd, _PUNCH_HOLE, offset, length):
                raise _refused(ctypes.get_errno())

    return punch


def _refused(code: int) -> OSError:
    return OSError(code, f"punching a hole: {os.strerror(code)}")


LIBRARY = Path(__file__).with_name("libpunch.so")
try:
    punch = loop_in_c(LIBRARY)
except OSError:
    punch = loop_in_ctypes()

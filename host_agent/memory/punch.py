"""Holes in files, many in one call: a loop in C where that was built, else one of ctypes's calls.

punch.c is compiled when the package is installed, if there is a compiler (hatch_build.py).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

Punch = Callable[[int, Sequence[int], Sequence[int]], None]
"""Drop the memory behind ranges of a file: descriptor, offsets and lengths in bytes.

:raises OSError: the kernel refused; earlier ranges have been dropped.
"""

_PUNCH_HOLE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE, which needs FALLOC_FL_KEEP_SIZE (include/uapi/linux/falloc.h)."""


def in_c(library: Path) -> Punch:
    """The loop of punch.c.

    :raises OSError: it was not built, or not for this machine.
    """
    punch_all = ctypes.CDLL(str(library)).punch_all
    punch_all.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def punch(fd: int, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        starts, sizes = array("q", offsets), array("q", lengths)
        code = punch_all(fd, starts.buffer_info()[0], sizes.buffer_info()[0], len(starts))
        if code:
            raise _refused(code)

    return punch


def one_by_one() -> Punch:
    """A call through ctypes for each: a hundredth of a batch's time slower, and more on a machine
    with cold caches."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def punch(fd: int, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        if any(map(fallocate, repeat(fd), repeat(_PUNCH_HOLE), offsets, lengths)):
            raise _refused(ctypes.get_errno())

    return punch


def _refused(code: int) -> OSError:
    return OSError(code, f"punching a hole: {os.strerror(code)}")


LIBRARY = Path(__file__).with_name("libpunch.so")
try:
    punch = in_c(LIBRARY)
except OSError:
    punch = one_by_one()

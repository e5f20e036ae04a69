"""Memory for a workload: blocks of an embedded guest, or anonymous memory of a real one."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

from guest_agent.memory.buddy import BuddyAllocator
from guest_agent.procfs import mem_available_bytes
from guest_agent.workload import EXTENT_BYTES
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES, format_size

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; Python's mmap has it from 3.13
_SPARE_BYTES = 8 * MIB
_ASSURED_EXTENTS = 8
"""What is taken between two looks at what there is."""
_PATIENCE_S = 10.0
_PAUSE_S = 0.1
_EXTENT_ORDER = (EXTENT_BYTES // PAGE_BYTES).bit_length() - 1


class BuddySource:
    """Extents are blocks of the embedded allocator; bytes lie in the RAM file."""

    def __init__(self, allocator: BuddyAllocator, ram: mmap.mmap) -> None:
        self._allocator = allocator
        self._ram = ram

    def allocate(self) -> int:
        return self._allocator.allocate(_EXTENT_ORDER)

    def write(self, extent: int, data: memoryview) -> None:
        start = extent * PAGE_BYTES
        self._ram[start : start + EXTENT_BYTES] = data

    def read(self, extent: int) -> bytes:
        start = extent * PAGE_BYTES
        return self._ram[start : start + EXTENT_BYTES]

    def free(self, extent: int) -> None:
        self._allocator.free(extent, _EXTENT_ORDER)


class BuddyPlugs:
    """Memory that comes to and leaves the last zone of an embedded guest."""

    def __init__(self, allocator: BuddyAllocator) -> None:
        self._allocator = allocator
        self._zone = allocator.zones[-1]

    def online(self, pages: RangeSet) -> None:
        self._allocator.online(self._zone, pages - self._zone.present)

    def offline(self, pages: RangeSet) -> None:
        try:
            self._allocator.offline(pages & self._zone.present)
        except MemoryError as error:
            raise Refused(str(error)) from error


class AnonymousSource:
    """Extents are aligned parts of one private mapping; freed with MADV_DONTNEED.

    MADV_HUGEPAGE has the kernel back an extent with one order-9 page where it
    can, as it does for the heaps of large programs.
    """

    def __init__(
        self,
        size_bytes: int,
        available_bytes: Callable[[], int] = mem_available_bytes,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """Reserve address space for `size_bytes`; no memory is used yet.

        :param available_bytes: what the guest can still use.
        :param patience_s: how long memory that is isolated, or in the balloon, is waited for.
        """
        self._available_bytes = available_bytes
        self._patience_s = patience_s
        self._assured_extents = 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, size_bytes + EXTENT_BYTES, flags=flags)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start = -address % EXTENT_BYTES
        self._free = list(range(size_bytes // EXTENT_BYTES - 1, -1, -1))

    def allocate(self) -> int:
        if not self._free:
            raise MemoryError("the workload's address space is used up")
        if not self._assured_extents:
            self._assured_extents = min(self._wait_for_room(), _ASSURED_EXTENTS)
        self._assured_extents -= 1
        return self._free.pop()

    def _wait_for_room(self) -> int:
        """How many extents there is memory for, as soon as there is for one. A kernel that has
        none kills a process rather than say so."""
        deadline_s = time.monotonic() + self._patience_s
        while (room_bytes := self._available_bytes() - _SPARE_BYTES) < EXTENT_BYTES:
            if time.monotonic() > deadline_s:
                left_bytes = max(0, room_bytes + _SPARE_BYTES)
                raise MemoryError(f"{format_size(left_bytes)} are left to it")
            time.sleep(_PAUSE_S)
        return room_bytes // EXTENT_BYTES

    def write(self, extent: int, data: memoryview) -> None:
        at = self._start + extent * EXTENT_BYTES
        self._map[at : at + EXTENT_BYTES] = data

    def read(self, extent: int) -> bytes:
        at = self._start + extent * EXTENT_BYTES
        return self._map[at : at + EXTENT_BYTES]

    def free(self, extent: int) -> None:
        self._map.madvise(mmap.MADV_DONTNEED, self._start + extent * EXTENT_BYTES, EXTENT_BYTES)
        self._free.append(extent)

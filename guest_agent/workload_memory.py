"""Memory for a workload: blocks of an embedded guest's allocator, or anonymous memory of a real
guest. Also the hotplug of an embedded guest (that of a real guest: memory/blocks.py)."""

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

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; in Python's mmap since 3.13
_SPARE_BYTES = 8 * MIB
_EXTENTS_PER_CHECK = 8
"""How many extents are allocated before available memory is read again."""
_TIMEOUT_S = 10.0
_POLL_S = 0.1
_EXTENT_ORDER = (EXTENT_BYTES // PAGE_BYTES).bit_length() - 1


class BuddySource:
    """Extents are blocks of the embedded allocator, numbered by first pfn; their bytes are in the
    RAM file."""

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
    """Onlines memory into the last zone of an embedded guest, and offlines it from there."""

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
    """Extents are aligned parts of one private mapping; they are freed with MADV_DONTNEED."""

    def __init__(
        self,
        size_bytes: int,
        available_bytes: Callable[[], int] = mem_available_bytes,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Reserve address space for `size_bytes`; no memory is used yet.

        :param available_bytes: return the memory that the guest can still use.
        :param timeout_s: how long `allocate` waits for memory, which may be isolated or in the
            balloon.
        """
        self._available_bytes = available_bytes
        self._timeout_s = timeout_s
        self._extents_before_check = 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, size_bytes + EXTENT_BYTES, flags=flags)
        # With MADV_HUGEPAGE, the kernel backs an extent with one page of order 9 where it can, so
        # that a freed extent is a whole free chunk. Heaps of large programs get such pages, too.
        self._map.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start = -address % EXTENT_BYTES
        self._free = list(range(size_bytes // EXTENT_BYTES - 1, -1, -1))

    def allocate(self) -> int:
        if not self._free:
            raise MemoryError("the workload's address space is used up")
        if not self._extents_before_check:
            self._extents_before_check = min(self._wait_for_memory(), _EXTENTS_PER_CHECK)
        self._extents_before_check -= 1
        return self._free.pop()

    def _wait_for_memory(self) -> int:
        """Wait until there is memory for one extent; return how many extents there is memory for.

        :raises MemoryError: there is no memory for one extent in time.
        """
        # Do not just write to the extent: memory is overcommitted, so a kernel without free memory
        # kills a process instead of returning an error.
        deadline_s = time.monotonic() + self._timeout_s
        while (usable_bytes := self._available_bytes() - _SPARE_BYTES) < EXTENT_BYTES:
            if time.monotonic() > deadline_s:
                left_bytes = max(0, usable_bytes + _SPARE_BYTES)
                raise MemoryError(f"only {format_size(left_bytes)} are available")
            time.sleep(_POLL_S)
        return usable_bytes // EXTENT_BYTES

    def write(self, extent: int, data: memoryview) -> None:
        at = self._start + extent * EXTENT_BYTES
        self._map[at : at + EXTENT_BYTES] = data

    def read(self, extent: int) -> bytes:
        at = self._start + extent * EXTENT_BYTES
        return self._map[at : at + EXTENT_BYTES]

    def free(self, extent: int) -> None:
        self._map.madvise(mmap.MADV_DONTNEED, self._start + extent * EXTENT_BYTES, EXTENT_BYTES)
        self._free.append(extent)

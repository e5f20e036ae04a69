"""Memory for a workload: blocks of an embedded guest's allocator, or anonymous memory of a real
guest. Also the hotplug of an embedded guest (that of a real guest: memory/blocks.py)."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.procfs import mem_available_bytes
from guest_agent.workload.source import EXTENT_BYTES
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES, format_size

_MAP_NORESERVE = 0x4000  # asm-generic/mman.h; in Python's mmap since 3.13
_SPARE_BYTES = 8 * MIB
_CHECK_EVERY_BYTES = 16 * MIB
"""How much is allocated, at most, before available memory is read again."""
_ONE_BYTE_PER_PAGE = bytes(EXTENT_BYTES // PAGE_BYTES)
_ADDRESSES_PER_BYTE = 4
"""Address space that is reserved for each byte of the guest's memory: small blocks that are left
over cut it up, and the guest's kernel can still give memory for an extent elsewhere."""
_TIMEOUT_S = 10.0
_POLL_S = 0.1


class BuddySource:
    """Blocks of a buddy allocator; the bytes of a block are in `ram`, at its address + `start`."""

    def __init__(self, allocator: BuddyAllocator, ram: mmap.mmap, start: int = 0) -> None:
        """:param start: the offset in `ram` of the byte with address 0."""
        self._allocator = allocator
        self._ram = ram
        self._start = start

    def allocate(self, size_bytes: int) -> int:
        return self._allocator.allocate(_order(size_bytes)) * PAGE_BYTES

    def write(self, at: int, data: memoryview) -> None:
        start = self._start + at
        self._ram[start : start + len(data)] = data

    def read(self, at: int, size_bytes: int) -> bytes:
        start = self._start + at
        return self._ram[start : start + size_bytes]

    def copy(self, source_at: int, target_at: int) -> None:
        source, target = self._start + source_at, self._start + target_at
        # Without the view, the slice that is read would first be copied into a bytes object.
        with memoryview(self._ram) as view:
            view[target : target + EXTENT_BYTES] = view[source : source + EXTENT_BYTES]

    def touch(self, at: int) -> None:
        start = self._start + at
        # Drops this process's mappings, not the data: the next write to a page is a fault, also
        # where the host has not punched.
        self._ram.madvise(mmap.MADV_DONTNEED, start, EXTENT_BYTES)
        self._write_to_each_page(start)

    def _write_to_each_page(self, start: int) -> None:
        self._ram[start : start + EXTENT_BYTES : PAGE_BYTES] = _ONE_BYTE_PER_PAGE

    def free(self, at: int, size_bytes: int) -> None:
        self._allocator.free(at // PAGE_BYTES, _order(size_bytes))


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


class AnonymousSource(BuddySource):
    """Blocks are aligned parts of one private mapping; they are freed with MADV_DONTNEED.

    A buddy allocator, as in an embedded guest, records which addresses of the mapping are in use.
    """

    def __init__(
        self,
        size_bytes: int,
        available_bytes: Callable[[], int] = mem_available_bytes,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Reserve address space for the workload of a guest with `size_bytes` of memory; no memory
        is used yet.

        :param available_bytes: return the memory that the guest can still use.
        :param timeout_s: how long `allocate` waits for memory, which may be isolated or in the
            balloon.
        """
        self._available_bytes = available_bytes
        self._timeout_s = timeout_s
        self._bytes_before_check = 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        reserved_bytes = _ADDRESSES_PER_BYTE * size_bytes
        mapping = mmap.mmap(-1, reserved_bytes + EXTENT_BYTES, flags=flags)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pages = RangeSet([(0, reserved_bytes // PAGE_BYTES)])
        addresses = ZoneSpec(name="addresses", present=pages)
        allocator = BuddyAllocator([addresses], chunk_order=_order(EXTENT_BYTES))
        allocator.zones[0].min_watermark_pages = 0
        super().__init__(allocator, mapping, start=-address % EXTENT_BYTES)

    def allocate(self, size_bytes: int) -> int:
        if self._bytes_before_check < size_bytes:
            self._bytes_before_check = min(self._wait_for_memory(size_bytes), _CHECK_EVERY_BYTES)
        self._bytes_before_check -= size_bytes
        at = super().allocate(size_bytes)
        # With MADV_HUGEPAGE, the kernel backs an extent with one page of order 9 where it can, so
        # that a freed extent is a whole free chunk. Heaps of large programs get such pages, too.
        # A smaller block must not become part of such a page.
        is_extent = size_bytes == EXTENT_BYTES
        advice = mmap.MADV_HUGEPAGE if is_extent else mmap.MADV_NOHUGEPAGE
        self._ram.madvise(advice, self._start + at, size_bytes)
        return at

    def touch(self, at: int) -> None:
        # Pages of 4 KiB, as in page_fault1 without huge pages.
        self._ram.madvise(mmap.MADV_NOHUGEPAGE, self._start + at, EXTENT_BYTES)
        self._write_to_each_page(self._start + at)

    def free(self, at: int, size_bytes: int) -> None:
        self._ram.madvise(mmap.MADV_DONTNEED, self._start + at, size_bytes)
        super().free(at, size_bytes)

    def _wait_for_memory(self, size_bytes: int) -> int:
        """Wait until a block of this size leaves 8 MiB available; return how much may be used.

        :raises MemoryError: so much was not available in time.
        """
        # Ask first, instead of just writing to the block: memory is overcommitted, so a kernel
        # without free memory does not return an error, but kills a process.
        deadline_s = time.monotonic() + self._timeout_s
        while (usable_bytes := self._available_bytes() - _SPARE_BYTES) < size_bytes:
            if time.monotonic() > deadline_s:
                left_bytes = max(0, usable_bytes + _SPARE_BYTES)
                raise MemoryError(f"only {format_size(left_bytes)} are available")
            time.sleep(_POLL_S)
        return usable_bytes


def _order(size_bytes: int) -> int:
    return (size_bytes // PAGE_BYTES).bit_length() - 1

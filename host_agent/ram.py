"""A guest's RAM as the host sees it: parts of files, in guest physical order.

Residency comes from the file itself (SEEK_DATA/SEEK_HOLE, blocks), so it holds
for a guest process's memfd as for QEMU's. Shared memory (shmem) only: there a
page is resident exactly if it is data, mm/shmem.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hintfleet.ranges import Range, RangeSet
from hintfleet.units import PAGE_BYTES

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of guest pages that lies in one file in one piece.

    :ivar pfn: first page frame number, guest physical.
    :ivar fd: open for reading and writing; owned by the GuestRam.
    :ivar offset_bytes: where the first page lies in the file; a multiple of the page size.
    """

    pfn: int
    page_count: int
    fd: int
    offset_bytes: int

    def to_offset(self, pfn: int) -> int:
        """Byte offset in the file of a page of this segment."""
        return self.offset_bytes + (pfn - self.pfn) * PAGE_BYTES


class GuestRam:
    """All of a guest's RAM, and the one place that punches holes in it."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Take ownership of the segments' file descriptors; segments must not overlap."""
        self._segments = tuple(sorted(segments, key=lambda s: s.pfn))
        self._fds = sorted({s.fd for s in segments})
        self.pages = RangeSet((s.pfn, s.page_count) for s in segments)

    @property
    def provisioned_bytes(self) -> int:
        """What the guest was promised."""
        return self.pages.page_count * PAGE_BYTES

    def resident_bytes(self) -> int:
        """Blocks of the RAM files: one system call a file."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._fds)

    def resident(self, within: RangeSet) -> RangeSet:
        """The pages of `within` that are resident. Pages outside the RAM never are."""
        return RangeSet(
            extent
            for segment, part in self._parts(within)
            for extent in _data_extents(segment, part)
        )

    def punch(self, ranges: RangeSet) -> None:
        """Drop the memory behind `ranges`: one system call per range and segment.

        :raises OSError: the kernel refused; earlier ranges may have been dropped.
        """
        for segment, part in self._parts(ranges):
            length = part.page_count * PAGE_BYTES
            if _fallocate(
                segment.fd,
                _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
                segment.to_offset(part.pfn),
                length,
            ):
                code = ctypes.get_errno()
                raise OSError(code, f"punching {length} bytes: {os.strerror(code)}")

    def only_fd(self) -> int:
        """The file that all of this RAM lies in.

        :raises ValueError: it lies in several.
        """
        (fd,) = self._fds
        return fd

    def close(self) -> None:
        """Close the files, so that the kernel frees what a dead guest held."""
        fds, self._fds, self._segments = self._fds, [], ()
        for fd in fds:
            os.close(fd)

    def _parts(self, ranges: RangeSet) -> Iterator[tuple[Segment, Range]]:
        for segment in self._segments:
            whole = RangeSet([(segment.pfn, segment.page_count)])
            for part in ranges & whole:
                yield segment, part


def _data_extents(segment: Segment, part: Range) -> Iterator[Range]:
    at = segment.to_offset(part.pfn)
    end = at + part.page_count * PAGE_BYTES
    while at < end:
        try:
            data = os.lseek(segment.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                return
            raise
        if data >= end:
            return
        hole = min(os.lseek(segment.fd, data, os.SEEK_HOLE), end)
        first = segment.pfn + (data - segment.offset_bytes) // PAGE_BYTES
        last = segment.pfn + (hole - segment.offset_bytes + PAGE_BYTES - 1) // PAGE_BYTES
        yield Range(first, last - first)
        at = hole

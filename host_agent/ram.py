"""A guest's RAM as the host sees it: parts of files, in guest physical order, which come
and go while the guest runs.

Residency comes from the file itself (SEEK_DATA/SEEK_HOLE, blocks), so it holds
for a guest process's memfd as for QEMU's. Shared memory (shmem) only: there a
page is resident exactly if it is data, mm/shmem.c.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hintfleet.ranges import Range, RangeSet
from hintfleet.units import PAGE_BYTES
from host_agent.page_map import PageMap
from host_agent.punch import punch


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

    @cached_property
    def pages(self) -> RangeSet:
        """All of them."""
        return RangeSet([(self.pfn, self.page_count)])

    @cached_property
    def page_map(self) -> PageMap:
        """The same, as the books keep sets of pages."""
        return PageMap(self.pages)

    def to_offset(self, pfn: int) -> int:
        """Byte offset in the file of a page of this segment."""
        return self.offset_bytes + (pfn - self.pfn) * PAGE_BYTES


class GuestRam:
    """All of a guest's RAM, and the one place that punches holes in it."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Take ownership of the segments' file descriptors; segments must not overlap."""
        self._segments: tuple[Segment, ...] = ()
        self.plug(segments)

    @property
    def pages(self) -> RangeSet:
        """All page frames that are RAM now."""
        return self._pages

    @property
    def page_map(self) -> PageMap:
        """The same, as the books keep sets of pages."""
        return self._page_map

    @property
    def provisioned_bytes(self) -> int:
        """What the guest has now."""
        return self.pages.page_count * PAGE_BYTES

    def resident_bytes(self) -> int:
        """Blocks of the RAM files: one system call a file."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._fds)

    def resident(self, within: PageMap) -> PageMap:
        """The pages of `within` that are resident. Pages outside the RAM never are."""
        return PageMap(
            extent
            for segment in self._segments
            for extent in _data_extents(segment, within & segment.page_map)
        )

    def punch(self, ranges: RangeSet) -> None:
        """Drop the memory behind `ranges`: one system call per range and segment.

        :raises OSError: the kernel refused; earlier ranges may have been dropped.
        """
        for segment, parts in self._parts(ranges):
            offsets = [segment.to_offset(pfn) for pfn, _ in parts]
            lengths = [page_count * PAGE_BYTES for _, page_count in parts]
            punch(segment.fd, offsets, lengths)

    def plug(self, segments: Sequence[Segment]) -> None:
        """More RAM: take ownership of its files, as in the beginning."""
        self._set_segments((*self._segments, *segments))

    def unplug(self, pages: RangeSet) -> None:
        """Less RAM: drop the memory behind `pages`, and close files of which nothing is left.

        :raises OSError: the kernel refused the punch; all of it is RAM still.
        """
        self.punch(pages)
        before = self._fds
        self._set_segments(
            replace(
                segment,
                pfn=part.pfn,
                page_count=part.page_count,
                offset_bytes=segment.to_offset(part.pfn),
            )
            for segment, parts in self._parts(self.pages - pages)
            for part in parts
        )
        _close_all(before - self._fds)

    def only_fd(self) -> int:
        """The file that all of this RAM lies in.

        :raises ValueError: it lies in several.
        """
        (fd,) = self._fds
        return fd

    def close(self) -> None:
        """Close the files, so that the kernel frees what a dead guest held."""
        fds = self._fds
        self._set_segments(())
        _close_all(fds)

    @property
    def _fds(self) -> frozenset[int]:
        return frozenset(segment.fd for segment in self._segments)

    def _set_segments(self, segments: Iterable[Segment]) -> None:
        self._segments = tuple(sorted(segments, key=lambda s: s.pfn))
        self._pages = RangeSet((s.pfn, s.page_count) for s in self._segments)
        self._page_map = PageMap(self._pages)

    def _parts(self, ranges: RangeSet) -> Iterator[tuple[Segment, RangeSet]]:
        for segment in self._segments:
            yield segment, ranges & segment.pages


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _data_extents(segment: Segment, within: PageMap) -> Iterator[Range]:
    data = -1
    for part in within:
        at = segment.to_offset(part.pfn)
        end = at + part.page_count * PAGE_BYTES
        while at < end:
            if data < at:  # else it is what comes next from here, too
                data = _next_data(segment.fd, at)
            if data >= end:
                break
            hole = min(os.lseek(segment.fd, data, os.SEEK_HOLE), end)
            if hole > data:  # else QEMU has dropped it since: reporting, a balloon
                first = segment.pfn + (data - segment.offset_bytes) // PAGE_BYTES
                last = segment.pfn + (hole - segment.offset_bytes + PAGE_BYTES - 1) // PAGE_BYTES
                yield Range(first, last - first)
            at, data = hole, -1


def _next_data(fd: int, offset_bytes: int) -> int:
    try:
        return os.lseek(fd, offset_bytes, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from here to the end of the file
            return sys.maxsize
        raise

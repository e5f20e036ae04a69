"""A guest's RAM as the host sees it: parts of files, in guest physical order, which come
and go while the guest runs.

Residency comes from the file itself (SEEK_DATA/SEEK_HOLE, blocks), so it holds
for a guest process's memfd as for QEMU's. Shared memory (shmem) only: there a
page is resident exactly if it is data, mm/shmem.c. A look costs a system call or two
for each run of pages that it passes, and what the kernel's walk over those that are
resident takes, some 30 ns a page.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hintfleet.ranges import Range, RangeSet
from hintfleet.units import PAGE_BYTES
from host_agent.memory.cache_count import cached_bytes
from host_agent.memory.page_map import PageMap, first_pfn
from host_agent.memory.punch import punch


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


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at the RAM files found.

    :ivar resident: the pages that are resident, where it looked.
    :ivar next_pfn: where the next look should begin: where this one found something last, or
        behind where its time was over.
    """

    resident: PageMap
    next_pfn: int


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
        return self.look(within).resident

    def look(
        self,
        within: PageMap,
        start_pfn: int = 0,
        most_pages: float = math.inf,
        slice_s: float = math.inf,
    ) -> Look:
        """Look for the resident pages of `within`, one section after the other, beginning with
        that of `start_pfn` and going round.

        :param most_pages: look no further when so many are found.
        :param slice_s: nor after so much processor time; the next look goes on behind.
        """
        walks = [_Walk(segment, within & segment.page_map) for segment in self._segments]
        found: list[PageMap] = []
        found_pages, next_pfn = 0, start_pfn
        end_s = time.thread_time() + slice_s
        for section in within.sections_from(start_pfn):
            here = PageMap(extent for walk in walks for extent in walk.data_extents(section))
            if here:
                found.append(here)
                found_pages += here.page_count
                next_pfn = first_pfn(section)
            if found_pages >= most_pages:
                break
            if time.thread_time() > end_s:
                next_pfn = first_pfn(section + 1)
                break
        return Look(resident=PageMap.union(found), next_pfn=next_pfn)

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
        """Less RAM: forget `pages`, whose memory must have been dropped before. Close files of
        which nothing is left."""
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


class _Walk:
    """Finds data in one segment's file. Remembers what the last system call said of the places
    behind the one that it was asked for, and does not ask again."""

    def __init__(self, segment: Segment, within: PageMap) -> None:
        self._segment = segment
        self._within = within
        # No data in [asked, data), nothing else in [data, hole); nothing is known yet.
        self._asked, self._data, self._hole = sys.maxsize, 0, 0

    def data_extents(self, section: int) -> Iterator[Range]:
        """The resident runs among the pages of one section that are to be looked at."""
        segment = self._segment
        to_pfn = segment.pfn - segment.offset_bytes // PAGE_BYTES
        for part in self._within.runs_in(section):
            at = segment.to_offset(part.pfn)
            for data, hole in self._extents(at, at + part.page_count * PAGE_BYTES):
                yield Range(data // PAGE_BYTES + to_pfn, (hole - data) // PAGE_BYTES)

    def _extents(self, at: int, end: int) -> Iterator[tuple[int, int]]:
        fd = self._segment.fd
        left = -1
        while at < end:
            if not self._asked <= at < max(self._hole, self._data + 1):
                self._asked, self._data = at, _next_data(fd, at)
                self._hole = self._data
            data = max(at, self._data)
            if data >= end:
                return
            if self._hole <= data:
                # SEEK_HOLE would walk through all that is resident behind `end`, too.
                left = cached_bytes(fd, data, end - data) if left < 0 else left
                self._hole = end if left == end - data else os.lseek(fd, data, os.SEEK_HOLE)
            at = min(end, self._hole)
            if at > data:
                yield data, at
                left -= at - data
            else:  # QEMU has dropped it since: reporting, a balloon
                self._asked = sys.maxsize


def _next_data(fd: int, offset_bytes: int) -> int:
    try:
        return os.lseek(fd, offset_bytes, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from here to the end of the file
            return sys.maxsize
        raise

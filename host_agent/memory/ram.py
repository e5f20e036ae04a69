"""A guest's RAM on the host: parts of files, in guest physical order. Parts may be plugged and
unplugged while the guest runs.

What is resident is read from the file itself (SEEK_DATA and SEEK_HOLE of lseek(2), cachestat(2),
st_blocks of fstat(2)), the same way for the memfd of an embedded guest and for those of QEMU. The
file must be shared memory (shmem), where a page is data exactly if it is in memory or swapped out
(mm/shmem.c); both count as resident. A look costs a few system calls for each run of pages that it
passes, and some tens of nanoseconds for each resident page that the kernel walks through.

Holes are punched through a fence, piece by piece (fence.py).
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hintfleet.ranges import Range, RangeSet
from hintfleet.units import PAGE_BYTES
from host_agent.memory.cache_count import cached_bytes
from host_agent.memory.fence import Fence
from host_agent.memory.page_map import PageMap, first_pfn
from host_agent.memory.punch import punch

# The most pages in one punch: so few that who closes the fence waits only milliseconds for it.
_PIECE_PAGES = 4096


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of guest pages that lies in one piece in one file. Drivers make segments; for a VM,
    QEMU reports where in which file a guest physical address lies (door/protocol.py).

    :ivar pfn: first page frame number, guest physical.
    :ivar fd: the file, open for reading and writing; owned by the GuestRam that has the segment.
    :ivar offset_bytes: offset of the first page in the file; a multiple of the page size.
    """

    pfn: int
    page_count: int
    fd: int
    offset_bytes: int

    @cached_property
    def pages(self) -> RangeSet:
        """All pages of the segment."""
        return RangeSet([(self.pfn, self.page_count)])

    @cached_property
    def page_map(self) -> PageMap:
        """All pages of the segment, as a map."""
        return PageMap(self.pages)

    def to_offset(self, pfn: int) -> int:
        """Return the offset in the file, in bytes, of a page of this segment."""
        return self.offset_bytes + (pfn - self.pfn) * PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at the RAM files found.

    :ivar resident: the resident pages, as far as the look came.
    :ivar next_pfn: where the next look should begin. If this look ran out of time: the section
        after the last one that it looked at; else the last section in which it found pages, or its
        own start if it found none.
    """

    resident: PageMap
    next_pfn: int


def close_files(segments: Iterable[Segment]) -> None:
    """Close the files of segments that no GuestRam owns."""
    _close_all({segment.fd for segment in segments})


class GuestRam:
    """All of a guest's RAM. In this process only this class punches holes into it. QEMU may, too:
    under a peer, or if an operator moves the balloon of an attached guest."""

    def __init__(self, segments: Sequence[Segment], fence: Fence | None = None) -> None:
        """Take ownership of the segments' file descriptors; segments must not overlap.

        :param fence: keeps punches out while it is closed; None for a fence that stays open.
        """
        self._fence = fence or Fence()
        self._segments: tuple[Segment, ...] = ()
        self.plug(segments)

    @property
    def pages(self) -> RangeSet:
        """All page frames that are RAM now."""
        return self._pages

    @property
    def page_map(self) -> PageMap:
        """All page frames that are RAM now, as a map."""
        return self._page_map

    @property
    def provisioned_bytes(self) -> int:
        """Size of the guest's RAM now, resident or not; includes plugged memory."""
        return self.pages.page_count * PAGE_BYTES

    def resident_bytes(self) -> int:
        """Return how much of the RAM files is resident: one system call for each file."""
        # st_blocks counts units of 512 bytes, whatever the file system's block size (stat(2)).
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._files)

    def resident(self, within: PageMap) -> PageMap:
        """Return the pages of `within` that are RAM and resident."""
        return self.look(within).resident

    def look(
        self,
        within: PageMap,
        start_pfn: int = 0,
        max_pages: float = math.inf,
        slice_s: float = math.inf,
    ) -> Look:
        """Look for the resident pages of `within`, section by section: from the section of
        `start_pfn` to the last, then from the first to the one before the section of `start_pfn`.

        :param max_pages: stop after the section in which this number of resident pages is reached.
        :param slice_s: stop after the section in which this processor time is over.
        :raises OSError: the kernel does not report what is resident.
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
            if found_pages >= max_pages:
                break
            # Checked only after a section, so that each look makes progress even if `slice_s` is 0.
            if time.thread_time() > end_s:
                next_pfn = first_pfn(section + 1)
                break
        return Look(resident=PageMap.union(found), next_pfn=next_pfn)

    def permit(self) -> int:
        """Return a permit for `punch`. It ends when QEMU stops or resets the guest (fence.py)."""
        return self._fence.permit()

    def punch(self, ranges: RangeSet, permit: int) -> None:
        """Drop the memory behind those parts of `ranges` that are RAM. A range is cut at the ends
        of segments, and into pieces of at most _PIECE_PAGES; each piece costs one system call.

        :param permit: taken when it was decided that these ranges may be dropped.
        :raises OSError: the kernel refused a piece; others may have been dropped.
        :raises FenceClosed: the fence is closed, or the permit ended; a part may have been dropped.
        """
        with self._fence.inside(permit):
            for segment, parts in self._parts(ranges):
                pieces = _pieces(parts)
                offsets = array("q", [segment.to_offset(pfn) for pfn, _ in pieces])
                lengths = array("q", [page_count * PAGE_BYTES for _, page_count in pieces])
                punch(segment.fd, offsets, lengths, self._fence.closed_times, permit)

    def plug(self, segments: Sequence[Segment]) -> None:
        """Add these segments to the RAM, and take ownership of their file descriptors."""
        self._set_segments((*self._segments, *segments))

    def unplug(self, pages: RangeSet) -> None:
        """Remove `pages` from the RAM, without dropping their memory. Close each file descriptor
        that no segment of the RAM uses any more."""
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
        """Return the descriptor of the one file that has all of this RAM.

        :raises ValueError: there are several descriptors, or none.
        """
        (fd,) = self._fds
        return fd

    def close(self) -> None:
        """Close the files. The kernel frees their memory once the guest's process has ended."""
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
        # One descriptor for each file: plugged memory may lie in a file that has another descriptor
        # already, and `resident_bytes` must not count it twice.
        self._files = {os.fstat(fd).st_ino: fd for fd in self._fds}.values()

    def _parts(self, ranges: RangeSet) -> Iterator[tuple[Segment, RangeSet]]:
        for segment in self._segments:
            yield segment, ranges & segment.pages


def _pieces(ranges: RangeSet) -> list[Range]:
    """Return all of `ranges` in order, in pieces of at most _PIECE_PAGES pages."""
    return [
        Range(at, min(_PIECE_PAGES, pfn + page_count - at))
        for pfn, page_count in ranges
        for at in range(pfn, pfn + page_count, _PIECE_PAGES)
    ]


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Walk:
    """Finds data in one segment's file. It remembers what the last system calls returned (a hole
    and the data behind it), and makes no further call for offsets in there."""

    def __init__(self, segment: Segment, within: PageMap) -> None:
        self._segment = segment
        self._within = within
        # There is no data in [_asked, _data), and only data in [_data, _hole). These values mean
        # that nothing is known yet.
        self._asked, self._data, self._hole = sys.maxsize, 0, 0

    def data_extents(self, section: int) -> Iterator[Range]:
        """Yield the runs of resident pages in one section, within the pages to look at."""
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
                # First count what is resident from `data` to `end`: if all is, SEEK_HOLE is not
                # needed. SEEK_HOLE does not stop at `end`: it walks through data to the next hole.
                left = cached_bytes(fd, data, end - data) if left < 0 else left
                self._hole = end if left == end - data else os.lseek(fd, data, os.SEEK_HOLE)
            at = min(end, self._hole)
            if at > data:
                yield data, at
                left -= at - data
            else:
                # SEEK_HOLE returned the offset `data` itself: QEMU dropped the page after SEEK_DATA
                # had found it (free page reporting, balloon). So call SEEK_DATA again.
                self._asked = sys.maxsize


def _next_data(fd: int, offset_bytes: int) -> int:
    try:
        return os.lseek(fd, offset_bytes, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # lseek(2): no data from here to the end of the file
            return sys.maxsize
        raise

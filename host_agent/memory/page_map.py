"""Sets of a guest's pages for the books: a bitmap for each section of RAM. (Where a page lies in
which file: ram.py, `Segment`.)

A guest decides how fragmented its memory is, so the host's cost must not depend on that. A set
operation on `RangeSet`s costs time for each range in them. A guest of 4 GiB that touches every
second page would make half a million ranges, and each entry into its books would take half a
second. Here, an operation handles a bitmap of 512 bytes for each section of 16 MiB, however many
runs of pages the section has. Only making a map from ranges, and iterating over its runs, take
time for each range or run: with many of them, do that in a worker thread.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from hintfleet.errors import InvalidInput
from hintfleet.ranges import MAX_PFN, Range, RangeSet

_SHIFT = 12
_SECTION_PAGES = 1 << _SHIFT
_FULL = (1 << _SECTION_PAGES) - 1
# The header of a packed section: its number, and the size of its bitmap in bytes. A full section
# has size 0 and no bitmap: in a mostly untouched guest nearly all sections of `untouched` are
# full, and their bitmaps of 512 bytes each would be nearly all that is stored.
_HEADER = struct.Struct("<IH")


class PageMap:
    """An immutable set of page frames. A section without pages has no entry."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Make a set from (pfn, page_count) pairs in any order, which may overlap."""
        sections: dict[int, int] = {}
        for section, bits in _cut(ranges):
            sections[section] = sections.get(section, 0) | bits
        self._sections: Mapping[int, int] = sections

    @classmethod
    def _of(cls, sections: Mapping[int, int]) -> PageMap:
        pages = cls.__new__(cls)
        pages._sections = sections
        return pages

    @classmethod
    def union(cls, parts: Iterable[PageMap]) -> PageMap:
        """Return the pages of all parts. No two parts may have pages in the same section."""
        sections: dict[int, int] = {}
        for part in parts:
            sections.update(part._sections)
        return cls._of(sections)

    def __iter__(self) -> Iterator[Range]:
        """Yield runs of pages in order; a run that crosses a section's end is yielded in parts."""
        for section, bits in sorted(self._sections.items()):
            yield from _runs(section << _SHIFT, bits)

    def __bool__(self) -> bool:
        return bool(self._sections)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageMap) and self._sections == other._sections

    def __hash__(self) -> int:
        return hash(frozenset(self._sections.items()))

    def __repr__(self) -> str:
        return f"PageMap({[tuple(run) for run in self.ranges()]})"

    def ranges(self) -> RangeSet:
        """Return the set as ranges; adjacent runs are merged."""
        return RangeSet(self)

    @cached_property
    def page_count(self) -> int:
        """How many pages are in the set."""
        return sum(bits.bit_count() for bits in self._sections.values())

    @property
    def section_count(self) -> int:
        """How many sections have a page in the set."""
        return len(self._sections)

    @cached_property
    def run_count(self) -> int:
        """How many runs `__iter__` yields."""
        return sum((bits & ~(bits << 1)).bit_count() for bits in self._sections.values())

    def overlaps(self, run: Range) -> bool:
        """Return whether any page of `run` is in the set."""
        return any(self._sections.get(section, 0) & bits for section, bits in _cut([run]))

    def sections_from(self, pfn: int) -> Iterator[int]:
        """Yield the numbers of all sections that have pages: in order from the section of `pfn` to
        the last, then from the first to the one before the section of `pfn`."""
        sections = sorted(self._sections)
        first = bisect_left(sections, pfn >> _SHIFT)
        yield from sections[first:]
        yield from sections[:first]

    def runs_in(self, section: int) -> Iterator[Range]:
        """Yield the runs of pages in one section."""
        yield from _runs(section << _SHIFT, self._sections.get(section, 0))

    def __or__(self, other: PageMap) -> PageMap:
        few, many = sorted((self, other), key=lambda pages: len(pages._sections))
        if not few:
            return many
        sections = dict(many._sections)
        for section, bits in few._sections.items():
            sections[section] = sections.get(section, 0) | bits
        return PageMap._of(sections)

    def __and__(self, other: PageMap) -> PageMap:
        few, many = sorted((self, other), key=lambda pages: len(pages._sections))
        shared = (
            (section, bits & many._sections.get(section, 0))
            for section, bits in few._sections.items()
        )
        return PageMap._of({section: bits for section, bits in shared if bits})

    def __sub__(self, other: PageMap) -> PageMap:
        if not other._sections:
            return self
        # In `reclaim` both sets are often equal, because many batches hint only resident memory.
        if self._sections == other._sections:
            return NO_PAGES
        sections = dict(self._sections)
        for section in self._sections.keys() & other._sections.keys():
            if left := sections[section] & ~other._sections[section]:
                sections[section] = left
            else:
                del sections[section]
        return PageMap._of(sections)

    def whole_chunks(self, order: int) -> PageMap:
        """Return the pages of all chunks that have a page in this set. A chunk is an aligned block
        of 2**order pages; order is 12 at most."""
        chunk = (1 << (1 << order)) - 1
        first_pages = _FULL // chunk
        sections = {}
        for section, bits in self._sections.items():
            for step in range(order):  # collects a chunk's bits in the bit of its first page
                bits |= bits >> (1 << step)
            sections[section] = (bits & first_pages) * chunk
        return PageMap._of(sections)

    def pack(self) -> bytes:
        """Return the set as bytes, for `unpack`: at most 518 for each section that has pages, even
        if it has many runs."""
        parts: list[bytes] = []
        for section, bits in self._sections.items():
            bitmap = b"" if bits == _FULL else bits.to_bytes(-(-bits.bit_length() // 8))
            parts += (_HEADER.pack(section, len(bitmap)), bitmap)
        return b"".join(parts)

    @classmethod
    def unpack(cls, packed: bytes) -> PageMap:
        """Return the set that `pack` packed.

        :raises InvalidInput: a section is truncated or impossible.
        """
        sections: dict[int, int] = {}
        at = 0
        while at < len(packed):
            try:
                section, size = _HEADER.unpack_from(packed, at)
            except struct.error:
                raise InvalidInput("packed pages: truncated") from None
            at += _HEADER.size
            bits = int.from_bytes(packed[at : at + size]) if size else _FULL
            at += size
            if at > len(packed) or not 0 < bits <= _FULL or section >= MAX_PFN >> _SHIFT:
                raise InvalidInput("packed pages: truncated, or an impossible section")
            sections[section] = bits
        return cls._of(sections)


def first_pfn(section: int) -> int:
    """Return the first page frame of a section."""
    return section << _SHIFT


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield pairs of a section's number and the bits that `ranges` set in it. Ranges of one section
    that come one after the other are yielded together; a section may be yielded more than once."""
    section, bits = -1, 0
    for pfn, page_count in ranges:
        if not page_count:
            continue
        end = pfn + page_count
        first, last = pfn >> _SHIFT, (end - 1) >> _SHIFT
        if first != section:
            if bits:
                yield section, bits
            section, bits = first, 0
        at = pfn & (_SECTION_PAGES - 1)
        if last == section:
            bits |= ((1 << page_count) - 1) << at
            continue
        yield section, bits | _FULL >> at << at
        for whole in range(first + 1, last):
            yield whole, _FULL
        section, bits = last, (1 << end - (last << _SHIFT)) - 1
    if bits:
        yield section, bits


def _runs(pfn: int, bits: int) -> Iterator[Range]:
    """Yield the runs of pages whose bits are set in a section; the lowest bit is that of `pfn`."""
    if bits == _FULL:
        yield Range(pfn, _SECTION_PAGES)
        return
    # Search in a string, because str.find of one character is memchr(3), while each shift of an int
    # of 4096 bits would copy all of it.
    text = f"{bits:b}"[::-1] + "0"
    end = 0
    while (start := text.find("1", end)) >= 0:
        end = text.find("0", start)
        yield Range(pfn + start, end - start)


NO_PAGES = PageMap()

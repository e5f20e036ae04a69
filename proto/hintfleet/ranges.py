"""Sets of page frames, and their wire format.

Isolators, batches, ledgers and reclaim exchange sets of pages as `RangeSet`. `encode` and
`decode` convert it to and from its wire format:

    byte    shift: log2 of the largest common alignment of all starts and lengths, in pages
    varint  gap    from the end of the range before (first range: from pfn 0)
    varint  length
    ...

Gaps and lengths count units of 2**shift pages. A length is stored minus 1, and so is a gap
between two ranges, since neither can be 0. The empty set has no bytes. So every set has exactly one
encoding, and a typical range of a batch (whole chunks, at most 128, and at most 128 chunks after
the range before) costs two bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from hintfleet.errors import InvalidInput

MAX_PFN = 1 << 40
"""One past the largest pfn: 52 bits of physical address and 4 KiB pages (x86-64)."""

_MAX_SHIFT = 40
_MAX_VARINT_BYTES = 6


class Range(NamedTuple):
    """A run of pages: first page frame number and page count."""

    pfn: int
    page_count: int

    @property
    def end_pfn(self) -> int:
        """One past the last page."""
        return self.pfn + self.page_count


_first_pfn, _page_count = itemgetter(0), itemgetter(1)


class RangeSet:
    """An immutable set of page frames, kept as sorted ranges that do not touch.

    Overlapping and adjacent ranges are merged when the set is made; empty ones are dropped.
    Set operations take time linear in the number of ranges.
    """

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Make a set from (pfn, page_count) pairs in any order.

        :raises InvalidInput: a pfn or a page count is negative, or a range ends beyond MAX_PFN.
        """
        merged: list[Range] = []
        for pfn, page_count in sorted(ranges):
            if pfn < 0 or page_count < 0 or pfn + page_count > MAX_PFN:
                raise InvalidInput(f"range of {page_count} pages at pfn {pfn} cannot exist")
            if not page_count:
                continue
            if merged and pfn <= merged[-1].end_pfn:
                last = merged[-1]
                merged[-1] = Range(last.pfn, max(last.end_pfn, pfn + page_count) - last.pfn)
            else:
                merged.append(Range(pfn, page_count))
        self._ranges = tuple(merged)

    @classmethod
    def _of(cls, ranges: Iterable[Range]) -> RangeSet:
        """Make a set from ranges that are sorted and not empty and do not touch.

        Unlike __init__, does not sort, merge or check them.
        """
        made = cls.__new__(cls)
        made._ranges = tuple(ranges)
        return made

    def __iter__(self) -> Iterator[Range]:
        return iter(self._ranges)

    def __len__(self) -> int:
        """Number of ranges (not of pages)."""
        return len(self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(self._ranges)

    def __repr__(self) -> str:
        return f"RangeSet({[tuple(r) for r in self._ranges]})"

    @property
    def page_count(self) -> int:
        """Pages in all ranges."""
        return sum(map(_page_count, self._ranges))

    def __contains__(self, pfn: int) -> bool:
        at = bisect_right(self._ranges, pfn, key=_first_pfn) - 1
        return at >= 0 and pfn < self._ranges[at].end_pfn

    def whole_chunks(self, order: int) -> RangeSet:
        """Return all aligned chunks of 2**order pages that contain a page of this set."""
        chunk = 1 << order
        return RangeSet(
            (start, -(-r.end_pfn // chunk) * chunk - start)
            for r in self._ranges
            for start in [r.pfn & -chunk]
        )

    def __or__(self, other: RangeSet) -> RangeSet:
        if not other._ranges or not self._ranges:
            return self if self._ranges else other
        return RangeSet((*self._ranges, *other._ranges))

    def __and__(self, other: RangeSet) -> RangeSet:
        if other._holds_all_of(self):  # the usual case: a guest hints pages of its own RAM
            return self
        mine, theirs = self._ranges, other._ranges
        found: list[Range] = []
        i = j = 0
        while i < len(mine) and j < len(theirs):
            start = max(mine[i].pfn, theirs[j].pfn)
            end = min(mine[i].end_pfn, theirs[j].end_pfn)
            if start < end:
                found.append(Range(start, end - start))
            if mine[i].end_pfn < theirs[j].end_pfn:
                i += 1
            else:
                j += 1
        return RangeSet._of(found)

    def _holds_all_of(self, other: RangeSet) -> bool:
        """Return whether one range of this set contains the whole set `other`; true if `other` is
        empty."""
        if not other._ranges:
            return True
        first, last = other._ranges[0], other._ranges[-1]
        at = bisect_right(self._ranges, first.pfn, key=_first_pfn) - 1
        return at >= 0 and last.end_pfn <= self._ranges[at].end_pfn

    def __sub__(self, other: RangeSet) -> RangeSet:
        if self._ranges is other._ranges or other._holds_all_of(self):
            return EMPTY
        theirs = other._ranges
        left: list[Range] = []
        j = 0
        for pfn, page_count in self._ranges:
            end = pfn + page_count
            while j < len(theirs) and theirs[j].end_pfn <= pfn:
                j += 1
            k = j
            while k < len(theirs) and theirs[k].pfn < end:
                if theirs[k].pfn > pfn:
                    left.append(Range(pfn, theirs[k].pfn - pfn))
                pfn = theirs[k].end_pfn
                k += 1
            if pfn < end:
                left.append(Range(pfn, end - pfn))
        return RangeSet._of(left)


EMPTY = RangeSet()


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def encode(ranges: RangeSet) -> bytes:
    """Pack a set for the wire; the empty set is b""."""
    if not ranges:
        return b""
    # The lowest bit that is set in any start or length is the common alignment of all.
    bits = 0
    for pfn, page_count in ranges:
        bits |= pfn | page_count
    shift = (bits & -bits).bit_length() - 1
    out = bytearray((shift,))
    end = -1  # so that the first gap, which can be 0, is stored as it is
    for pfn, page_count in ranges:
        start = pfn >> shift
        _put_varint(out, start - end - 1)
        length = page_count >> shift
        _put_varint(out, length - 1)
        end = start + length
    return bytes(out)


def decode(packed: bytes, max_ranges: int = 1 << 20) -> RangeSet:
    """Unpack a set. Accepts only what `encode` returns, so that `encode(decode(b)) == b`.

    Takes time linear in the length of `packed`, whatever it contains.

    :raises InvalidInput: `packed` is truncated or not what `encode` returns, a range ends beyond
        MAX_PFN, or there are more than `max_ranges` ranges.
    """
    if not packed:
        return EMPTY
    shift = packed[0]
    if shift > _MAX_SHIFT:
        raise InvalidInput(f"packed ranges: alignment 2**{shift} pages is too large")
    numbers = _varints(packed[1:])
    if len(numbers) % 2:
        raise InvalidInput("packed ranges: truncated")
    if len(numbers) > 2 * max_ranges:
        raise InvalidInput(f"packed ranges: more than {max_ranges} ranges")
    found: list[Range] = []
    end = -1
    bits = 0
    for gap, length_minus_1 in zip(numbers[::2], numbers[1::2], strict=True):
        start, length = end + 1 + gap, length_minus_1 + 1
        end = start + length
        bits |= start | length
        found.append(Range(start << shift, length << shift))
    if end << shift > MAX_PFN:
        raise InvalidInput(f"packed ranges: the last of {len(found)} ends beyond pfn 2**40")
    if not bits & 1:
        raise InvalidInput("packed ranges: not canonical (the alignment can be larger)")
    return RangeSet._of(found)


def _varints(packed: bytes) -> Sequence[int]:
    """Unpack all numbers. A byte holds seven bits of a number; the lowest bits are first.

    :raises InvalidInput: a number has more than 42 bits, is truncated, or has a needless byte.
    """
    # A byte below 128 ends a number. If all are below, as is usual, each byte is one number.
    if packed.isascii():
        return packed
    numbers: list[int] = []
    value = shift = 0
    for byte in packed:
        value |= (byte & 0x7F) << shift
        if byte > 0x7F:
            shift += 7
            if shift == 7 * _MAX_VARINT_BYTES:
                raise InvalidInput("packed ranges: number too long")
            continue
        if byte == 0 and shift:  # the same number without this byte is shorter
            raise InvalidInput("packed ranges: not canonical (overlong number)")
        numbers.append(value)
        value = shift = 0
    if shift:
        raise InvalidInput("packed ranges: truncated")
    return numbers

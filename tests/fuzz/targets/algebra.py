"""Operations on range sets, compared with operations on integers in which each bit is a page; and
the round trip of a range set through its encoding."""

from __future__ import annotations

from hintfleet.ranges import RangeSet, decode, encode
from tests.fuzz.target import Target

_PAGES = 32
_ORDER = 2


def _ranges(bits: int) -> RangeSet:
    return RangeSet((pfn, 1) for pfn in range(_PAGES) if bits >> pfn & 1)


def _bits(ranges: RangeSet) -> int:
    """Return the pages as bits; check that the ranges are sorted and do not touch."""
    bits, last_end = 0, -1
    for pfn, page_count in ranges:
        assert pfn > last_end
        assert page_count > 0
        bits |= ((1 << page_count) - 1) << pfn
        last_end = pfn + page_count
    return bits


def _whole_chunks(bits: int) -> int:
    chunk = (1 << (1 << _ORDER)) - 1
    masks = (chunk << at for at in range(0, _PAGES, 1 << _ORDER))
    return sum(mask for mask in masks if bits & mask)


def try_input(data: bytes) -> None:
    a_bits = int.from_bytes(data[: _PAGES // 8], "little")
    b_bits = int.from_bytes(data[_PAGES // 8 : _PAGES // 4], "little")
    a, b = _ranges(a_bits), _ranges(b_bits)
    assert _bits(a | b) == a_bits | b_bits
    assert _bits(a & b) == a_bits & b_bits
    assert _bits(a - b) == a_bits & ~b_bits
    assert _bits(a.whole_chunks(_ORDER)) == _whole_chunks(a_bits)
    assert a.page_count == a_bits.bit_count()
    assert all((pfn in a) == bool(a_bits >> pfn & 1) for pfn in range(0, _PAGES, 7))
    assert decode(encode(a)) == a


TARGET = Target.of(
    try_input,
    seeds=(b"\xff" * 8 + b"\xf0" * 8, b"\x0f\x01" * 8),
    max_bytes=_PAGES // 4,
    quick_runs=10_000,
)

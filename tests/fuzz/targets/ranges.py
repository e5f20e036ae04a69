"""The range codec on bytes of a hostile guest, compared with a slow and obvious decoder."""

from __future__ import annotations

from hintfleet.errors import InvalidInput
from hintfleet.ranges import EMPTY, MAX_PFN, RangeSet, decode, encode
from hintfleet.units import GIB, PAGE_BYTES
from tests.fuzz.target import Target

_LONGEST_NUMBER_BYTES = 6


def _numbers(packed: bytes) -> list[int]:
    """Return the LEB128 numbers in `packed`; an unfinished number at the end is dropped."""
    numbers, bits = [], ""
    for byte in packed:
        bits = f"{byte & 0x7F:07b}{bits}"
        if byte < 0x80:
            numbers.append(int(bits, 2))
            bits = ""
    return numbers


def _leb128(number: int) -> bytes:
    sevens = [number >> at & 0x7F for at in range(0, max(number.bit_length(), 1), 7)]
    return bytes(seven | 0x80 for seven in sevens[:-1]) + bytes(sevens[-1:])


def _spelling(shift: int, pairs: list[tuple[int, int]]) -> bytes:
    """Return the encoding of (start, length) pairs, which count units of 2**shift pages: a byte
    with the shift, then LEB128 numbers."""
    out, end = bytes([shift]), -1
    for start, length in pairs:
        out += _leb128(start - end - 1) + _leb128(length - 1)
        end = start + length
    return out


def reference(packed: bytes) -> list[tuple[int, int]] | None:
    """Return the (pfn, page_count) pairs; None if the bytes are not the canonical encoding of a
    set. To find that out, decode the bytes, encode the result canonically, and compare."""
    if not packed:
        return []
    shift, numbers = packed[0], _numbers(packed[1:])
    pairs, end = [], -1
    for gap, length in zip(numbers[::2], numbers[1::2], strict=False):
        pairs.append((end + 1 + gap, length + 1))
        end = sum(pairs[-1])
    ends_in_time = shift <= 40 and end << shift <= MAX_PFN
    aligned_no_better = any(number & 1 for pair in pairs for number in pair)
    if not ends_in_time or not aligned_no_better or _spelling(shift, pairs) != packed:
        return None
    return [(start << shift, length << shift) for start, length in pairs]


def try_input(packed: bytes) -> None:
    wanted = reference(packed)
    try:
        ranges = decode(packed)
    except InvalidInput:
        assert wanted is None
        return
    assert list(ranges) == wanted
    assert encode(ranges) == packed
    assert 2 * len(ranges) < len(packed) or not packed
    _has_bounded_work(ranges, packed)


def _has_bounded_work(ranges: RangeSet, packed: bytes) -> None:
    """Run operations that cost time for each range, not for each page: with an operation that
    costs time for each page, a huge range would take too long, which is a finding. Check also that
    `decode` refuses more ranges than its limit."""
    assert RangeSet(ranges) == ranges | ranges == ranges & ranges == ranges
    assert ranges - ranges == EMPTY
    assert len(ranges.whole_chunks(9)) <= len(ranges)
    if ranges:
        try:
            decode(packed, len(ranges) - 1)
        except InvalidInput:
            return
        raise AssertionError("more ranges than allowed")


TARGET = Target.of(
    try_input,
    seeds=tuple(
        encode(RangeSet(pairs))
        for pairs in (
            [(512, 512)],
            [(n << 10, 512) for n in range(32)],
            [(0, 3 * GIB // PAGE_BYTES), (1 << 20, GIB // PAGE_BYTES)],
            [(0, 1), (MAX_PFN - 1, 1)],
            [(0, MAX_PFN)],
        )
    ),
    max_bytes=128,
    quick_runs=20_000,
)

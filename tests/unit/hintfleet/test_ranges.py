"""RangeSet is a set of page frames; its encoding is small and unique."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from hintfleet.ranges import EMPTY, MAX_PFN, RangeSet, decode, encode

pairs = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40)), max_size=20)
wide = st.lists(
    st.tuples(st.integers(0, MAX_PFN - (1 << 20)), st.integers(0, 1 << 20)), max_size=20
)


def pages(ranges: RangeSet) -> set[int]:
    return {pfn for r in ranges for pfn in range(r.pfn, r.end_pfn)}


def model(given_pairs: list[tuple[int, int]]) -> set[int]:
    return {pfn for start, count in given_pairs for pfn in range(start, start + count)}


@given(pairs, pairs)
def test_behaves_like_a_set_of_pages(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    left, right = RangeSet(a), RangeSet(b)
    assert pages(left) == model(a)
    assert pages(left | right) == model(a) | model(b)
    assert pages(left & right) == model(a) & model(b)
    assert pages(left - right) == model(a) - model(b)
    assert left.page_count == len(model(a))
    assert all((pfn in left) == (pfn in model(a)) for pfn in range(450))


@given(pairs, pairs)
def test_results_are_sorted_and_do_not_touch(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    for ranges in (
        RangeSet(a) | RangeSet(b),
        RangeSet(a) & RangeSet(b),
        RangeSet(a) - RangeSet(b),
    ):
        ends = [(r.pfn, r.end_pfn) for r in ranges]
        assert all(start < end for start, end in ends)
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("bad", [(-1, 1), (0, -1), (MAX_PFN, 1)])
def test_impossible_ranges_are_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="cannot exist"):
        RangeSet([bad])


@given(wide)
def test_decode_undoes_encode(given_pairs: list[tuple[int, int]]) -> None:
    ranges = RangeSet(given_pairs)
    assert decode(encode(ranges)) == ranges


@given(st.binary(max_size=40))
def test_a_set_has_one_spelling(packed: bytes) -> None:
    try:
        ranges = decode(packed)
    except InvalidInput:
        return
    assert encode(ranges) == packed


@given(st.sets(st.integers(0, 4095), min_size=1, max_size=512))
def test_chunks_cost_at_most_three_bytes_a_range(chunks: set[int]) -> None:
    ranges = RangeSet((chunk << 9, 1 << 9) for chunk in chunks)
    assert len(encode(ranges)) <= 1 + 3 * len(ranges) + 1


def test_the_empty_set_costs_nothing() -> None:
    assert encode(EMPTY) == b""
    assert decode(b"") == EMPTY


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (b"\x00", "not canonical"),
        (b"\x29\x00\x00", "too large"),
        (b"\x00\x00", "truncated"),
        (b"\x00\x80", "truncated"),
        (b"\x00\x80\x00\x00", "overlong"),
        (b"\x00\xff\xff\xff\xff\xff\xff\x01", "too long"),
        (b"\x28\x01\x01", "beyond pfn"),
        (b"\x00\x02\x01", "alignment can be larger"),
    ],
)
def test_malformed_bytes_are_refused(packed: bytes, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        decode(packed)


def test_whole_chunks_cover_every_page_and_no_other_chunk() -> None:
    pages = RangeSet([(3, 1), (511, 2), (2048, 512), (3071, 1)])
    assert pages.whole_chunks(9) == RangeSet([(0, 1024), (2048, 1024)])
    assert pages.whole_chunks(0) == pages


def test_the_number_of_ranges_is_bounded() -> None:
    packed = encode(RangeSet((n * 2, 1) for n in range(10)))
    assert len(decode(packed, 10)) == 10
    with pytest.raises(InvalidInput, match="more than 9 ranges"):
        decode(packed, 9)

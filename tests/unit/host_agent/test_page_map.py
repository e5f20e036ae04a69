"""PageMap behaves like a plain set of pages. It can be packed and unpacked; malformed bytes are
refused."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from hintfleet.ranges import Range, RangeSet
from host_agent.memory.page_map import PageMap

SECTION = 4096
# Pages around the ends of sections, and whole sections.
edges = st.sampled_from([0, SECTION, 2 * SECTION, 5 * SECTION])
places = st.builds(lambda edge, by: max(0, edge + by), edges, st.integers(-6, 6))
lengths = st.one_of(st.integers(1, 12), st.sampled_from([SECTION - 1, SECTION, 2 * SECTION + 1]))
pairs = st.lists(st.tuples(places, lengths), max_size=6)


def model(given_pairs: list[tuple[int, int]]) -> set[int]:
    return {pfn for start, count in given_pairs for pfn in range(start, start + count)}


def pages(of: PageMap) -> set[int]:
    return model(list(of))


@given(pairs, pairs)
def test_behaves_like_a_set_of_pages(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    left, right = PageMap(a), PageMap(b)
    assert pages(left) == model(a)
    assert pages(left | right) == model(a) | model(b)
    assert pages(left & right) == model(a) & model(b)
    assert pages(left - right) == model(a) - model(b)
    assert left.page_count == len(model(a))
    assert bool(left - right) == bool(model(a) - model(b))
    assert (left == right) == (model(a) == model(b))
    assert left.ranges() == RangeSet(a)
    for run in RangeSet(b):
        assert left.overlaps(run) == bool(set(range(run.pfn, run.end_pfn)) & model(a))


@given(pairs)
def test_runs_are_in_order_and_counted(a: list[tuple[int, int]]) -> None:
    runs = list(PageMap(a))
    assert len(runs) == PageMap(a).run_count
    assert all(r.pfn // SECTION == (r.end_pfn - 1) // SECTION for r in runs)
    assert all(before.end_pfn <= after.pfn for before, after in pairwise(runs))


@given(pairs, st.integers(0, 12))
def test_whole_chunks_are_those_of_a_range_set(a: list[tuple[int, int]], order: int) -> None:
    assert PageMap(a).whole_chunks(order).ranges() == RangeSet(a).whole_chunks(order)


@given(pairs)
def test_what_is_packed_can_be_unpacked(a: list[tuple[int, int]]) -> None:
    assert PageMap.unpack(PageMap(a).pack()) == PageMap(a)


def test_a_terabyte_takes_no_more_room_for_being_cut_up() -> None:
    whole = PageMap([(0, 1 << 28)])
    assert len(whole.pack()) < 512 << 10
    cut = PageMap((pfn, 1) for pfn in range(0, 64 * SECTION, 2))
    assert cut.run_count == 32 * SECTION
    assert len(cut.pack()) < 64 * (SECTION // 8 + 8)


@pytest.mark.parametrize(
    "packed", [b"\0", PageMap([(3, 9)]).pack()[:-1], b"\0\0\0\0\1\0\0", b"\xff\xff\xff\xff\0\0"]
)
def test_malformed_packed_maps_are_refused(packed: bytes) -> None:
    with pytest.raises(InvalidInput, match="packed pages"):
        PageMap.unpack(packed)


def test_repr_shows_ranges() -> None:
    assert repr(PageMap([(4000, 200), (9, 1)])) == "PageMap([(9, 1), (4000, 200)])"
    assert list(PageMap([(4000, 200)])) == [Range(4000, 96), Range(4096, 104)]

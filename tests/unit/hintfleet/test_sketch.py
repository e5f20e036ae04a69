"""Percentiles of a sketch are right to 1 %, also of sketches that were merged."""

from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from hintfleet.sketch import LARGEST_VALUE, MOST_BUCKETS, RELATIVE_ERROR, Sketch, bucket_of

VALUES = st.lists(st.floats(1, LARGEST_VALUE), max_size=60)


def sketch(values: list[float]) -> Sketch:
    return Sketch.of(Counter(map(bucket_of, values)))


@given(VALUES, VALUES, st.floats(0.001, 1))
def test_a_quantile_is_near_the_exact_one(some: list[float], more: list[float], at: float) -> None:
    merged = Sketch.merged([sketch(some), sketch(more)])
    values = sorted(some + more)
    found = merged.quantile(at)
    assert merged == sketch(values)
    assert merged.total == len(values)
    if not values:
        assert found is None
        return
    exact = next(value for n, value in enumerate(values, 1) if n / len(values) >= at)
    assert found is not None
    assert abs(found - exact) <= exact * (RELATIVE_ERROR + 1e-9)


@given(VALUES)
@example([1.0] * 7 + [2.0] * 18)  # 7 / 25 * 25 is a little more than 7
def test_shares_grow_to_one_and_agree_with_quantiles(values: list[float]) -> None:
    made = sketch(values)
    found = list(made.cumulative())
    assert found == sorted(set(found))
    assert (found[-1][1] if found else 1.0) == 1.0
    assert all(made.quantile(share) == value for value, share in found)


def test_values_beyond_the_bounds_are_in_the_first_and_the_last_bucket() -> None:
    assert bucket_of(0) == bucket_of(0.5) == bucket_of(1) == 0
    assert bucket_of(1e300) == bucket_of(LARGEST_VALUE) == MOST_BUCKETS - 1


def test_a_sketch_without_values_merges() -> None:
    assert Sketch.merged([]) == Sketch.merged([Sketch(), Sketch()]) == Sketch()

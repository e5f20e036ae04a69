"""Intervals agree with values from t tables, and keep invariants."""

import math
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.results.statistics import mean_interval, paired_differences

finite = st.floats(-1e12, 1e12)


def test_against_a_hand_computed_interval() -> None:
    # mean 3, s = sqrt(2.5), t(4, 0.975) = 2.776445: 3 -/+ 2.776445 * sqrt(2.5 / 5)
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval is not None
    assert interval.mean == 3
    assert interval.low == pytest.approx(3 - 1.963243, abs=1e-6)
    assert interval.high == pytest.approx(3 + 1.963243, abs=1e-6)
    assert interval.pairs == 5


def test_two_pairs_have_a_wide_interval() -> None:
    # mean 10, s = sqrt(2), t(1, 0.975) = 12.7062: 10 -/+ 12.7062 * sqrt(2 / 2)
    interval = mean_interval([9.0, 11.0])
    assert interval is not None
    assert interval.high - interval.mean == pytest.approx(12.7062, abs=1e-4)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_pairs_have_none(values: list[float]) -> None:
    assert mean_interval(values) is None


@given(st.lists(finite, min_size=2, max_size=30))
def test_the_mean_is_inside(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval is not None
    assert interval.low <= interval.mean <= interval.high
    assert min(values) - 1e-3 <= interval.mean <= max(values) + 1e-3


@given(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=20), st.integers(-1000, 1000))
def test_a_shift_moves_all_three(values: list[int], shift: int) -> None:
    plain = mean_interval([float(v) for v in values])
    moved = mean_interval([float(v + shift) for v in values])
    assert plain is not None
    assert moved is not None
    for a, b in ((plain.mean, moved.mean), (plain.low, moved.low), (plain.high, moved.high)):
        assert math.isclose(a + shift, b, rel_tol=1e-9, abs_tol=1e-4)


@given(st.dictionaries(st.integers(0, 9), finite), st.dictionaries(st.integers(0, 9), finite))
def test_only_what_both_have_is_a_pair(a: dict[Hashable, float], b: dict[Hashable, float]) -> None:
    differences = paired_differences(a, b)
    assert sorted(differences) == sorted(a[key] - b[key] for key in a.keys() & b.keys())

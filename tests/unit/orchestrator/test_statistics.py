"""Intervals agree with values from t tables, and keep invariants. In simulated runs with normal
differences they have the true value about as often as they say, whenever a run stops."""

import math
from collections.abc import Hashable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.results.statistics import (
    half_width_in_deviations,
    mean_interval,
    paired_differences,
    pairs_needed,
)
from tests.support import coverage

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


@pytest.mark.parametrize("first_look", [2, 3, 5, 10])
def test_a_sequence_begins_where_lai_has_it_begin(first_look: int) -> None:
    interval = mean_interval([float(i) for i in range(first_look)], first_look)
    assert interval is not None
    deviation = math.sqrt(sum((i - interval.mean) ** 2 for i in range(first_look)))
    deviation /= math.sqrt(first_look - 1)
    a = interval.half_width * math.sqrt(first_look) / deviation
    t = stats.t(first_look - 1)
    assert 2 * t.sf(a) + 2 * a * t.pdf(a) == pytest.approx(0.05)


def test_a_sequence_has_no_interval_before_its_first_look() -> None:
    assert mean_interval([1.0, 2.0], first_look=3) is None
    found = mean_interval([1.0, 2.0, 4.0], first_look=3)
    assert found is not None
    assert (found.pairs, found.first_look) == (3, 3)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e9])
def test_the_interval_grows_with_the_spread(spread: float) -> None:
    one, other = (mean_interval([0.0, s, 3 * s], 3) for s in (1.0, spread))
    assert one is not None
    assert other is not None
    assert other.half_width == pytest.approx(one.half_width * spread)


@pytest.mark.parametrize("stop", coverage.STOPS)
def test_intervals_hold_the_truth_however_a_run_stops(stop: str) -> None:
    assert coverage.worst(coverage.seen_by(coverage.FIRST_LOOK), stop) >= 0.94


def test_an_interval_that_ignores_the_looks_fails_that_test() -> None:
    plain = coverage.seen_by(0)
    assert coverage.worst(plain, coverage.NARROW) < 0.94
    assert coverage.worst(plain, coverage.EXCLUDED) < 0.80
    assert coverage.worst(plain, coverage.NEVER) >= 0.94, "with one look it is exact"


@pytest.mark.parametrize(
    ("shape", "least"),
    [
        ("uniform", 0.93),
        ("bounded and skewed", 0.94),
        ("exponential", 0.85),
        ("one trial in ten far off", 0.70),
    ],
)
def test_differences_that_are_not_normal(shape: str, least: float) -> None:
    """For the last two shapes the method fails, as docs/statistics.md says."""
    found = coverage.worst(coverage.seen_by(coverage.FIRST_LOOK, shape), *coverage.STOPS)
    assert found >= least
    if least < 0.93:
        assert found < 0.94, "docs/statistics.md says that this one is not covered"


def test_a_run_that_waits_for_its_worst_arm_covers_all_of_them() -> None:
    """Three arms share a control, and the run stops when all three are narrow enough."""
    random = np.random.default_rng(3)
    control = random.normal(size=(coverage.RUNS, coverage.MOST))
    spreads = (0.5, 1.0, 2.0)
    arms = [
        coverage.look(control - spread * random.normal(size=control.shape), coverage.FIRST_LOOK)
        for spread in spreads
    ]
    ends = np.all([arm.half_widths <= 1.5 for arm in arms], axis=0)
    for arm in arms:
        assert coverage.ended(arm, 0.0, lambda _: ends.copy()).coverage >= 0.94


def test_how_many_pairs_an_interval_needs() -> None:
    interval = mean_interval([10.0, 12.0, 9.0, 11.0], 3)
    assert interval is not None
    needed = pairs_needed(interval, interval.half_width / 2)
    assert needed is not None
    deviation = math.sqrt(5 / 3)
    assert half_width_in_deviations(needed, 3) * deviation <= interval.half_width / 2
    assert half_width_in_deviations(needed - 1, 3) * deviation > interval.half_width / 2
    assert pairs_needed(interval, interval.half_width * 2) == 4, "those that are there"
    assert pairs_needed(interval, 1e-9) is None
    same = mean_interval([7.0, 7.0, 7.0], 3)
    assert same is not None
    assert pairs_needed(same, 0.0) == 3


@pytest.mark.parametrize("first_look", [0, 2, 3, 10, 40])
def test_intervals_get_narrower_with_each_pair(first_look: int) -> None:
    widths = [half_width_in_deviations(n, first_look) for n in range(max(2, first_look), 500)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))

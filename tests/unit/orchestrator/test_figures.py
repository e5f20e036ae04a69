"""How figures are printed for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import GIB, MIB
from orchestrator.results.footprint import Returned
from orchestrator.results.statistics import Interval
from orchestrator.view import figures


def interval(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high, pairs=6)


def test_one_unit_for_all_three() -> None:
    made = figures.size_interval(interval(412 * MIB, 401 * MIB, 423 * MIB))
    assert made == "412 MiB\n[401, 423]"
    made = figures.size_interval(interval(1.5 * GIB, -0.25 * GIB, 3.25 * GIB))
    assert made == "1.50 GiB\n[-0.25, 3.25]"


def test_numbers() -> None:
    assert figures.number_interval(interval(0.0201, 0.019, 0.0212)) == "0.0201\n[0.0190, 0.0212]"


@pytest.mark.parametrize(("seconds", "shown"), [(5, "00:05"), (65.4, "01:05"), (3661, "1:01:01")])
def test_clock(seconds: float, shown: str) -> None:
    assert figures.clock(seconds) == shown


def test_returned_says_when() -> None:
    part = Returned(freed_bytes=100, left_bytes=94.0, after_s=2.005)
    assert figures.returned(part) == "94 % in 2 s"
    assert figures.returned(None) == "-"


@given(st.lists(st.integers(0, 1000)), st.integers(0, 1000), st.integers(0, 60))
def test_a_sparkline_keeps_its_width(values: list[int], top: int, width: int) -> None:
    assert len(figures.sparkline(values, top, width)) == width

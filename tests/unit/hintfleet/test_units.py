"""The parsers of sizes and durations. A size must say whether it is binary or decimal. Printed
sizes are short, and close to the exact size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput
from hintfleet.units import format_size, parse_duration_s, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("384MiB", 384 << 20),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("7B", 7),
        ("1TiB", 1 << 40),
        # Computed in floating point, these would be wrong.
        ("2.03MB", 2_030_000),
        ("9007199254740993.0B", (1 << 53) + 1),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4G", "ambiguous"),
        ("4", "no unit"),
        ("4gib", "unknown unit"),
        ("-1GiB", "not a number"),
        ("", "not a number"),
        ("0.3B", "whole number of bytes"),
        ("9000000TiB", "larger than any memory"),
        ("9" * 5000 + "B", "not a number"),
    ],
)
def test_unclear_sizes_are_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse_size(text)


def test_a_bare_letter_is_answered_with_both_meanings() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_size("4G")
    assert "4GiB" in caught.value.hint
    assert "4GB" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2), ("500ms", 0.5), ("1.5min", 90), ("1h", 3600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["2", "2 weeks", "s", "9" * 400 + "s"])
def test_unclear_durations_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_duration_s(text)


@given(st.integers(0, 1 << 50))
def test_printed_sizes_are_short_and_close(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert len(text) <= 8
    assert parse_size_near(text) == pytest.approx(size_bytes, rel=0.01, abs=0.5)


def parse_size_near(text: str) -> float:
    number, unit = text.split()
    return float(number) * parse_size(f"1{unit}")

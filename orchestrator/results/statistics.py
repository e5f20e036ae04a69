"""Intervals of paired differences. Pure.

Why Student's t and not a bootstrap: there are few pairs (three in the
quickstart). The percentile bootstrap of so few covers the truth far less often than it
claims (a resample of three cannot show more spread than the three have), while t is
exact for differences that are normal and errs to the wide side for the bounded,
nearly symmetric ones that memory footprints give.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval, and the pairs behind it."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_differences(
    control: Mapping[Hashable, float], treated: Mapping[Hashable, float]
) -> list[float]:
    """Control less treated, for every key that both have, in the order of `treated`.

    The differences have to be independent for their interval to be true: a key is a
    trial, not a part of one.
    """
    return [control[key] - value for key, value in treated.items() if key in control]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The mean of `values` with its 95 % interval; None for fewer than two, which
    say nothing about their spread."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    reach = _student_t(n - 1) * math.sqrt(variance / n)
    return Interval(mean=mean, low=mean - reach, high=mean + reach, pairs=n)


def _student_t(degrees_of_freedom: int) -> float:
    from scipy.special import stdtrit  # 0.3 s to import, and only a summary needs it

    return float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))

"""Confidence intervals of paired differences. Pure.

Why Student's t and not a bootstrap: there are few pairs (three in the quickstart). With so
few, the percentile bootstrap covers the true value far less often than it claims, because a
resample of three cannot show more spread than the three have. The t interval is exact for
normal differences. For the bounded, nearly symmetric differences of memory footprints it is
somewhat too wide.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
_ALMOST_NOTHING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, its confidence interval, and the number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int


def sum_by_trial(values: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """Return the sum of the values of each trial: of its hosts, or of its guests.

    :param values: the key of a trial, and a value.
    """
    # Hosts of one trial share its noise. If each host were a pair of its own, one random draw
    # would count several times, and the interval would be too narrow.
    sums: dict[Hashable, float] = {}
    for trial, value in values:
        sums[trial] = sums.get(trial, 0.0) + value
    return sums


def paired_differences(
    control: Mapping[Hashable, float], treated: Mapping[Hashable, float]
) -> list[float]:
    """Return control minus treated for each key that both have, in the order of `treated`.

    The interval is valid only if the differences are independent, so a key must be a whole
    trial, not a part of one.
    """
    return [control[key] - value for key, value in treated.items() if key in control]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of `values` with its 95 % interval; None for fewer than two values."""
    n = len(values)
    if n < 2:  # one value has no spread
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half_width = _student_t(n - 1) * math.sqrt(variance / n)
    return Interval(mean=mean, low=mean - half_width, high=mean + half_width, pairs=n)


def ratio_percent(
    control: Mapping[Hashable, float], treated: Mapping[Hashable, float]
) -> Interval | None:
    """Return by how many percent `treated` is more than `control`: the geometric mean of the pairs'
    ratios, with its 95 % interval; None for fewer than two pairs.

    The values are not negative.
    """
    return percent_of_logs(mean_interval(paired_differences(logs(treated), logs(control))))


def logs(values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Return the logarithm of each value, for differences that stand for ratios.

    Logarithms of ratios are averaged, not ratios: a trial that is twice as slow and one that is
    twice as fast then cancel out.
    """
    # log(0) is not defined.
    return {key: math.log(max(value, _ALMOST_NOTHING)) for key, value in values.items()}


def percent_of_logs(log_ratio: Interval | None) -> Interval | None:
    """Convert the interval of a logarithm of a ratio into percent: log(1.5) is 50 % more."""
    if log_ratio is None:
        return None
    mean, low, high = (
        100 * math.expm1(value) for value in (log_ratio.mean, log_ratio.low, log_ratio.high)
    )
    return Interval(mean=mean, low=low, high=high, pairs=log_ratio.pairs)


def _student_t(degrees_of_freedom: int) -> float:
    from scipy.special import stdtrit  # 0.3 s to import, and only a summary needs it

    return float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))

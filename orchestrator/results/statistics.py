"""Confidence intervals of paired differences. Pure.

If the number of pairs was fixed beforehand, the interval is Student's t. Why not a bootstrap:
there are few pairs (three in the quickstart). With so few, the percentile bootstrap covers the
true value far less often than it claims, because a resample of three cannot show more spread than
the three have. The t interval is exact for normal differences. For others it is approximate: of
three uniformly distributed ones, it has the true mean in 92 % of cases.

If a run was stopped by what its figures said (`precision` in a spec), Student's t would cover the
true value too seldom: a run stops where the interval happens to be narrow. Then the interval is
one of Lai's t confidence sequence: for normal differences, at least 95 % of all runs have the true
value in *all* their intervals, from the first look on. So it does not matter when a run stops, nor
why, nor whether it is resumed. docs/statistics.md compares it with other methods, and says where it
fails.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

CONFIDENCE = 0.95
MOST_PAIRS = 10_000
"""The most that `pairs_needed` returns."""
_ALMOST_NOTHING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, its confidence interval, and the number of pairs.

    :ivar first_look: 0 if the number of pairs was fixed beforehand: Student's t. Else the number
        of pairs from which on the run looked whether to stop: Lai's t confidence sequence.
    """

    mean: float
    low: float
    high: float
    pairs: int
    first_look: int = 0

    @property
    def half_width(self) -> float:
        """Half of the distance from `low` to `high`."""
        return (self.high - self.low) / 2


def sum_by_trial(values: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """Return the sum of the values of each trial: of its hosts, or of its guests.

    :param values: pairs of a trial's key and a value.
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

    An interval of the differences is valid only if they are independent: so each key must be of
    another trial, not of another host or guest of the same trial.
    """
    return [control[key] - value for key, value in treated.items() if key in control]


def mean_interval(values: Sequence[float], first_look: int = 0) -> Interval | None:
    """Return the mean of `values` with its 95 % interval; None for fewer than two values, or for
    fewer than `first_look`.

    :param first_look: see `Interval`.
    """
    n = len(values)
    if n < max(2, first_look):  # one value has no spread
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half_width = half_width_in_deviations(n, first_look) * math.sqrt(variance)
    return Interval(
        mean=mean, low=mean - half_width, high=mean + half_width, pairs=n, first_look=first_look
    )


def ratio_percent(
    control: Mapping[Hashable, float], treated: Mapping[Hashable, float], first_look: int = 0
) -> Interval | None:
    """Return by how many percent `treated` is more than `control`: the geometric mean of the pairs'
    ratios, with its 95 % interval; None where `mean_interval` is None.

    The values are not negative.

    :param first_look: see `Interval`.
    """
    differences = paired_differences(logs(treated), logs(control))
    return percent_of_logs(mean_interval(differences, first_look))


def logs(values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Return the logarithm of each value (values below 1e-6 count as 1e-6), for differences that
    stand for ratios.

    Logarithms of ratios are averaged, not ratios: a trial that is twice as slow and one that is
    twice as fast then cancel out.
    """
    # log(0) is not defined.
    return {key: math.log(max(value, _ALMOST_NOTHING)) for key, value in values.items()}


def percent_of_logs(log_ratio: Interval | None) -> Interval | None:
    """Convert the interval of a logarithm of a ratio into percent: log(1.5) is 50 % more; None
    stays None."""
    if log_ratio is None:
        return None
    mean, low, high = (
        100 * math.expm1(value) for value in (log_ratio.mean, log_ratio.low, log_ratio.high)
    )
    return replace(log_ratio, mean=mean, low=low, high=high)


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, as two numbers from 0 to 1, if `count` of `of`
    independent observations were positive.

    C. J. Clopper and E. S. Pearson, The use of confidence or fiducial limits illustrated in the
    case of the binomial, Biometrika 26 (1934), 404-413: it covers the true share in at least 95 %
    of all cases, for every share and number.
    """
    from scipy.special import betaincinv  # see half_width_in_deviations

    outside = (1 - CONFIDENCE) / 2
    low = float(betaincinv(count, of - count + 1, outside)) if count else 0.0
    high = float(betaincinv(count + 1, of - count, 1 - outside)) if count < of else 1.0
    return low, high


def pairs_needed(interval: Interval, half_width: float) -> int | None:
    """Return about how many pairs an interval of this half width needs, if the spread stays as it
    is; at least the pairs that are there. None if 10,000 are not enough."""
    pairs, first_look = interval.pairs, interval.first_look
    deviation = interval.half_width / half_width_in_deviations(pairs, first_look)
    # Negative half widths: they rise with the number of pairs, as bisection needs it.
    found = bisect_left(
        range(MOST_PAIRS + 1),
        -half_width,
        lo=pairs,
        key=lambda n: -deviation * half_width_in_deviations(n, first_look),
    )
    return found if found <= MOST_PAIRS else None


@cache
def half_width_in_deviations(pairs: int, first_look: int = 0) -> float:
    """Return the half width of an interval as a multiple of the sample standard deviation.

    :param pairs: at least 2 and at least `first_look`.
    :param first_look: 0 for Student's t. Else for Lai's t confidence sequence from this number of
        pairs on: T. L. Lai, On confidence sequences, Annals of Statistics 4 (1976), 265-280; also
        in H. Wang and A. Ramdas, Anytime-valid t-tests and confidence sequences for Gaussian means
        with unknown variance, arXiv:2310.03722.
    """
    from scipy.special import fdtri, stdtrit  # 0.3 s to import, and only intervals need it

    n, m = pairs, first_look
    if not m:
        return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) / math.sqrt(n)
    # Lai: the true mean is outside the interval if (1 + T_n^2 / (n - 1))^n > b n, where T_n is
    # Student's statistic of n pairs. b is such that T_m = a is on the bound, where
    # P(|T_m| > a) + 2 a f(a) = 0.05, and f is the density of T_m. The left side is P(F > a^2 / 3),
    # where F has Fisher's distribution with 3 and m - 1 degrees of freedom: both vanish at
    # infinity, and their derivatives by a are both 2 a f'(a). So a^2 needs no root finding.
    a_squared = 3 * float(fdtri(3, m - 1, CONFIDENCE))
    bound = (1 + a_squared / (m - 1)) ** (m / n) * (n / m) ** (1 / n)
    return math.sqrt((n - 1) / n * (bound - 1))

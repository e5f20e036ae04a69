"""Simulates runs that stop by what their intervals say, and counts how often the interval at the
end has the true value.

    python -m tests.support.coverage    prints the tables of docs/statistics.md; some seconds

A run looks at its interval after 3 repetitions, and then after each, up to 20. The spread (the
standard deviation of the differences) is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from orchestrator.results.statistics import CONFIDENCE, mean_interval

FIRST_LOOK, MOST, RUNS = 3, 20, 2000
LOOKS = np.arange(FIRST_LOOK, MOST + 1)
ALPHA = 1 - CONFIDENCE

SPREADS = (0.2, 0.4, 0.7, 1.0, 1.5)
"""Multiples of the precision."""
EFFECTS = (0.0, 0.5, 1.0, 2.0, -1.0)
"""True differences, as multiples of the spread."""
NARROW, EXCLUDED, NEVER = STOPS = ("narrow enough", "0 is excluded", "never")

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]

SHAPES: dict[str, Draw] = {
    "normal": lambda random, size: random.normal(size=size),
    "uniform": lambda random, size: (random.random(size) - 0.5) * math.sqrt(12),
    "bounded and skewed": lambda random, size: (random.beta(2, 8, size) - 0.2) * math.sqrt(68.75),
    "exponential": lambda random, size: random.exponential(size=size) - 1,
    "one trial in ten far off": lambda random, size: (
        (random.normal(size=size) + 10 * (random.random(size) < 0.1) - 1) / math.sqrt(10)
    ),
}
"""How differences are distributed; each with mean 0 and variance 1."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What runs see at their looks: a row for each run, a column for each look."""

    means: Floats
    half_widths: Floats


Rule = Callable[[Seen], npt.NDArray[np.bool_]]
"""Says which looks would end a run."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How runs ended: the share whose last interval has the true value, and the mean number of
    repetitions."""

    coverage: float
    repetitions: float


def rules() -> Iterator[tuple[str, float, Rule]]:
    """Yield each way to stop as (one of STOPS, the true difference, the rule)."""
    for spread in SPREADS:
        yield NARROW, 0.0, narrow_at(spread)
    for effect in EFFECTS:
        yield EXCLUDED, effect, lambda seen: np.abs(seen.means) > seen.half_widths
    yield NEVER, 0.0, lambda seen: np.zeros_like(seen.means, dtype=bool)


def narrow_at(spread: float) -> Rule:
    """Return the rule to stop when the half width is at most the precision, which is 1 / spread."""
    return lambda seen: seen.half_widths <= 1 / spread


def look(differences: Floats, first_look: int) -> Seen:
    """Return what runs see with the intervals of hintfleet.

    :param differences: a row for each run: the differences of MOST pairs.
    :param first_look: as in `mean_interval`; 0 for Student's t at each look.
    """
    found = [
        [mean_interval(values[:n], first_look) for n in LOOKS] for values in differences.tolist()
    ]
    return Seen(
        means=np.array([[i.mean for i in run if i] for run in found]),
        half_widths=np.array([[i.half_width for i in run if i] for run in found]),
    )


@cache
def seen_by(first_look: int, shape: str = "normal") -> Seen:
    """Return what 2,000 runs see whose differences have this shape and mean 0."""
    return look(SHAPES[shape](np.random.default_rng(1), (RUNS, MOST)), first_look)


def ended(seen: Seen, effect: float, rule: Rule) -> Ended:
    """Return how runs end that stop by this rule and see these intervals, each moved by `effect`,
    the true difference."""
    ends = rule(Seen(means=seen.means + effect, half_widths=seen.half_widths))
    ends[:, -1] = True
    at = np.arange(len(ends)), ends.argmax(axis=1)
    covered = np.abs(seen.means[at]) <= seen.half_widths[at]
    return Ended(coverage=float(covered.mean()), repetitions=float(LOOKS[at[1]].mean()))


def worst(seen: Seen, *stops: str) -> float:
    """Return the coverage under the worst of all rules that stop in one of these ways."""
    return min(ended(seen, effect, rule).coverage for s, effect, rule in rules() if s in stops)


def student_at(alpha: float) -> Seen:
    """Return what runs see with Student's t at this error probability at each look."""
    plain = seen_by(0)
    ratio = stdtrit(LOOKS - 1, 1 - alpha / 2) / stdtrit(LOOKS - 1, 1 - ALPHA / 2)
    return Seen(means=plain.means, half_widths=plain.half_widths * ratio)


def pocock_alpha() -> float:
    """Return the error probability to use at each look, so that in 5 % of all runs at least one
    interval misses the true value."""
    drawn = np.random.default_rng(2).normal(size=(100_000, MOST))
    n = np.arange(1, MOST + 1)
    means = drawn.cumsum(axis=1) / n
    squares = (drawn**2).cumsum(axis=1) - n * means**2
    at = slice(FIRST_LOOK - 1, None)
    t = np.abs(means[:, at]) / np.sqrt(squares[:, at] / (LOOKS - 1) / LOOKS)
    return float(np.quantile((2 * stdtr(LOOKS - 1, -t)).min(axis=1), ALPHA))


def stein(spread: float) -> Ended:
    """Return how runs end, on average, by Stein's two stages: the first look decides how many
    repetitions there are in all, MOST at most. The precision is 1 / spread."""
    plain = seen_by(0)
    n = np.ceil((plain.half_widths[:, 0] * spread) ** 2 * FIRST_LOOK)
    n = n.clip(FIRST_LOOK, MOST).astype(int)
    half_widths = plain.half_widths[:, 0] * np.sqrt(FIRST_LOOK / n)
    covered = np.abs(plain.means[np.arange(len(n)), n - FIRST_LOOK]) <= half_widths
    return Ended(coverage=float(covered.mean()), repetitions=float(n.mean()))


def main() -> None:
    methods = {
        "Student's t at each look": seen_by(0),
        "Bonferroni": student_at(ALPHA / len(LOOKS)),
        "Pocock": student_at(pocock_alpha()),
        "Lai": seen_by(FIRST_LOOK),
    }
    two_stages = [stein(spread) for spread in SPREADS]
    _header("method", *(f"spread {spread:g}" for spread in SPREADS), "worst coverage")
    for name, seen in methods.items():
        costs = [ended(seen, 0.0, narrow_at(spread)).repetitions for spread in SPREADS]
        _row(name, *(f"{cost:.1f}" for cost in costs), _percent(worst(seen, *STOPS)))
    costs = [one.repetitions for one in two_stages]
    _row("Stein", *(f"{c:.1f}" for c in costs), _percent(min(o.coverage for o in two_stages)))
    print()
    _header("differences", *STOPS)
    for shape in SHAPES:
        _row(shape, *(_percent(worst(seen_by(FIRST_LOOK, shape), stop)) for stop in STOPS))


def _header(first: str, *names: str) -> None:
    _row(first, *names)
    _row("---", *("---:" for _ in names))


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()

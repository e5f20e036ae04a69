"""Decides whether a run with a precision goes on. Pure.

The run looks after each round (`trial/plan.rounds`), and goes on until the interval of each arm's
savings is narrow enough, or `most_repetitions` have run. `statistics.py` says why such intervals
are valid although the run looks at them several times.

A lost trial does not end a run early: it is left out, with its pair, because `run --resume` may
still give it a result. An undecided trial never gets another result, so its arm has no savings, and
the run does not wait for that arm. If a trial of the control is undecided, no arm will have
savings, and the run ends at the next look. In a switchback, an undecided block only leaves its pair
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.results.savings import By, FootprintRow, Savings, aggregate
from orchestrator.results.statistics import pairs_needed


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The precision that a run was asked for.

    :ivar percent: the half width, as a percentage of the control's mean resident memory; None if
        it is a size.
    :ivar size_bytes: the half width; None if it is a percentage.
    :ivar least_repetitions: how many always run, before the first look; also the least number of
        pairs with an interval (`statistics.Interval.first_look`).
    """

    percent: float | None
    size_bytes: int | None
    least_repetitions: int
    most_repetitions: int


@dataclass(frozen=True, kw_only=True)
class Reached:
    """How narrow the interval of an arm's savings is, beside what was asked for.

    :ivar more_repetitions: about how many more it takes, if the spread stays as it is; 0 if the
        interval is narrow enough, None if more than 10,000 in all.
    """

    half_width_bytes: float
    wanted_bytes: float
    more_repetitions: int | None

    @property
    def is_enough(self) -> bool:
        """Whether the interval is narrow enough."""
        return self.half_width_bytes <= self.wanted_bytes


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a run saw when it looked.

    :ivar repetitions: how many had run.
    :ivar arms: how narrow the interval of each arm is, by name; None if it has no interval yet.
        Without the control and arms with an undecided trial; empty if the control has one.
    """

    repetitions: int
    arms: Mapping[str, Reached | None]

    @property
    def is_enough(self) -> bool:
        """Whether the run need not go on."""
        return all(reached is not None and reached.is_enough for reached in self.arms.values())


def reached(row: Savings, precision: Precision) -> Reached | None:
    """Return how narrow the interval of a row is; None if it has none.

    :param row: of the whole fleet in one run (By.FLEET).
    """
    if row.saved_bytes is None or row.control_bytes is None:
        return None
    wanted = float(precision.size_bytes or row.control_bytes * (precision.percent or 0) / 100)
    needed = pairs_needed(row.saved_bytes, wanted)
    return Reached(
        half_width_bytes=row.saved_bytes.half_width,
        wanted_bytes=wanted,
        more_repetitions=None if needed is None else needed - row.saved_bytes.pairs,
    )


def look(rows: Iterable[FootprintRow], precision: Precision) -> Look:
    """Return what a run sees when all trials of the repetitions that have begun have ended.

    :param rows: of all attempts that count, in one run.
    """
    rows = list(rows)
    given_up = {row.arm for row in rows if row.undecided and not (row.lost or row.left_out)}
    controls = {row.arm for row in rows if row.is_control}
    arms = [] if controls & given_up else dict.fromkeys(row.arm for row in rows)
    counted = [row for row in rows if not row.undecided]
    found = {row.arm: reached(row, precision) for row in aggregate(counted, By.FLEET)}
    return Look(
        repetitions=len({row.repetition for row in rows}),
        arms={arm: found.get(arm) for arm in arms if arm not in controls | given_up},
    )

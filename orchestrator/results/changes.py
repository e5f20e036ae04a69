"""Computes how the figures of each arm changed from one run to another run of the same spec. Pure.

In both runs, the guests of a repetition get the same seeds. So a repetition is a pair: its figure
in the second run, and in the first. Figures are summed over the hosts of a trial, but settle times
are averaged, and a rate or percentile of loops is that of all loops of the trial. Figures that
compare an arm with the control do so within their own run, as in `savings` and `comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.results.capacity import (
    ArmCapacity,
    CapacityRow,
    capacities,
    guests_by_trial,
)
from orchestrator.results.comparison import CostRow, by_trial, step_s
from orchestrator.results.footprint import Footprint
from orchestrator.results.loop_comparison import LOOP_FIGURES
from orchestrator.results.loops import LoopSum, summed
from orchestrator.results.savings import By, FootprintRow, aggregate, counted
from orchestrator.results.statistics import (
    Interval,
    logs,
    mean_interval,
    percent_of_logs,
    sum_by_trial,
)

_US_PER_MS = 1000
_Values = Mapping[Hashable, float]
"""A figure of one arm in one run, by repetition."""


class Unit(StrEnum):
    """The unit of a figure."""

    BYTES = "bytes"
    GIB_MIN = "GiB·min"
    PERCENT = "%"
    SECONDS = "s"
    GUESTS = "guests"
    BYTES_PER_S = "bytes/s"
    MILLISECONDS = "ms"


class Figure(StrEnum):
    """A figure of an arm, with its name in output and in bounds (see `bounds`)."""

    SAVED = "saved"
    """Mean resident memory under the control minus that of the arm."""
    RESIDENT = "resident"
    """Mean resident memory."""
    GIB_MIN = "gib_min"
    """The integral of resident memory over time."""
    SLOWDOWN = "slowdown"
    """How much longer the workload's steps took than under the control."""
    HOST_CPU = "host_cpu"
    """`Cost.host_cpu_s` minus that under the control."""
    SETTLE = "settle"
    """The mean of all `Cost.settle_s` of a trial."""
    LOOP_RATE = "loop_rate"
    """The bytes that a guest touched in all loops of its workload, divided by the time that they
    lasted."""
    ALLOCATION_P99 = "allocation_p99"
    """How long 99 % of the allocations in all loops took at most."""
    GUESTS = "guests"
    """How many guests fitted, in a run that started them one by one. Such a run has no other
    figures."""

    @property
    def unit(self) -> Unit:
        return _UNITS[self]

    @property
    def percent_of(self) -> str:
        """The name of what is 100 % if the change of the figure is given in percent."""
        return f"{_PERCENT_OF[self]} in the first run"


_UNITS = {
    Figure.SAVED: Unit.BYTES,
    Figure.RESIDENT: Unit.BYTES,
    Figure.GIB_MIN: Unit.GIB_MIN,
    Figure.SLOWDOWN: Unit.PERCENT,
    Figure.HOST_CPU: Unit.SECONDS,
    Figure.SETTLE: Unit.SECONDS,
    Figure.LOOP_RATE: Unit.BYTES_PER_S,
    Figure.ALLOCATION_P99: Unit.MILLISECONDS,
    Figure.GUESTS: Unit.GUESTS,
}
_PERCENT_OF = {
    Figure.SAVED: "memory saved",
    Figure.RESIDENT: "mean resident memory",
    Figure.GIB_MIN: "GiB·min",
    Figure.SLOWDOWN: "time of the steps, divided by that under the control,",
    Figure.HOST_CPU: "host CPU time more than under the control",
    Figure.SETTLE: "settle time",
    Figure.LOOP_RATE: "rate of the loops",
    Figure.ALLOCATION_P99: "99th percentile of the loops' allocation times",
    Figure.GUESTS: "number of guests that fitted",
}


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The figures of one run, as the store returns them.

    :ivar capacities: set if the run started its guests one by one and any host has a capacity; then
        `footprints` is empty.
    """

    footprints: Sequence[FootprintRow]
    costs: Sequence[CostRow]
    capacities: Sequence[CapacityRow] = ()


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one figure of one arm from the first run to the second.

    :ivar pairs: the figure in the first and in the second run, for each repetition that both have,
        in its unit; of the slowdown, the logarithm of the ratio to the control. Empty if
        `undecided` is set.
    :ivar undecided: why the figure cannot be compared; empty if it can.
    :ivar first_look: of the runs' intervals (statistics.Interval).
    """

    arm: str
    figure: Figure
    pairs: tuple[tuple[float, float], ...] = ()
    undecided: str = ""
    first_look: int = 0

    @property
    def first(self) -> float | None:
        """The mean of the figure in the first run, over the repetitions that both runs have, in its
        unit (of the slowdown, the geometric mean); None if `undecided` is set."""
        return self._mean(0)

    @property
    def second(self) -> float | None:
        """As `first`, in the second run."""
        return self._mean(1)

    @property
    def difference(self) -> Interval | None:
        """The second run minus the first, in the figure's unit.

        None if `undecided` is set, with too few pairs (`mean_interval`), and for the slowdown: its
        change is a ratio.
        """
        return None if self.figure is Figure.SLOWDOWN else self._interval()

    @property
    def percent(self) -> Interval | None:
        """The difference in percent of `figure.percent_of`.

        None if `undecided` is set, and with too few pairs (`mean_interval`). Also None, except for
        the slowdown, if the figure is not above 0 in the first run with 95 % confidence: a
        percentage of it would say nothing.
        """
        if self.figure is Figure.SLOWDOWN:
            return percent_of_logs(self._interval())
        return _percent_of_first(self.pairs, self.first_look)

    def excess(self, factor: float = 1.0, offset: float = 0.0) -> list[float]:
        """Return second - (factor * first + offset) for each pair."""
        return [second - (factor * first + offset) for first, second in self.pairs]

    def _interval(self) -> Interval | None:
        return mean_interval(self.excess(), self.first_look)

    def _mean(self, run: int) -> float | None:
        if not self.pairs:
            return None
        mean = math.fsum(pair[run] for pair in self.pairs) / len(self.pairs)
        return 100 * math.expm1(mean) if self.figure is Figure.SLOWDOWN else mean


def compare_runs(first: RunRows, second: RunRows) -> list[Change]:
    """Return the change of each figure of each arm: first of the control, then of the other arms in
    the order of the spec. An arm has only the figures that it can have.

    In runs that started their guests one by one, arms have only GUESTS. In other runs, the control
    has no figure that compares with the control, and no SETTLE; if there is no control, no arm has
    SAVED, SLOWDOWN or HOST_CPU. Arms have LOOP_RATE if the workload has loops, ALLOCATION_P99 if
    loops allocate, SETTLE if the workload frees something, and SLOWDOWN if it has steps that take
    as long as the guest needs for them (so not in a switchback).

    :param first, second: rows of two runs of the same spec.
    """
    before, after = _arms(_counted(first)), _arms(_counted(second))
    # Both runs have the same spec, and so the same first look.
    first_look = max((row.first_look for row in first.footprints), default=0)
    return [
        _change(name, figure, before.get(name), after.get(name), first_look)
        for name in before | after
        for figure in Figure
        if any(figure in arms[name].values for arms in (before, after) if name in arms)
    ]


def _counted(run: RunRows) -> RunRows:
    return replace(run, footprints=counted(run.footprints), costs=counted(run.costs))


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """An arm in one run.

    :ivar values: has all figures that the arm can have.
    :ivar undecided: why the figures do not count; empty if they do.
    """

    values: Mapping[Figure, _Values]
    undecided: str


def _arms(run: RunRows) -> dict[str, _Arm]:
    if run.capacities:
        return {arm.arm: _arm_that_was_filled(run, arm) for arm in capacities(run.capacities)}
    control = next((row.arm for row in run.footprints if row.is_control), "")
    return {
        row.arm: _Arm(values=_values(run, row.arm, control), undecided=row.undecided)
        for row in aggregate(run.footprints, By.FLEET)
    }


def _arm_that_was_filled(run: RunRows, arm: ArmCapacity) -> _Arm:
    fitted = guests_by_trial(row for row in run.capacities if row.arm == arm.arm)
    undecided = arm.undecided
    if not undecided and arm.at_least:
        undecided = f"{arm.arm}, a host took all guests of the spec, and more might fit"
    return _Arm(values={Figure.GUESTS: fitted}, undecided=undecided)


def _values(run: RunRows, arm: str, control: str) -> dict[Figure, _Values]:
    resident = _memory(run, arm, lambda f: f.mean_resident_bytes)
    values = {
        Figure.RESIDENT: resident,
        Figure.GIB_MIN: _memory(run, arm, lambda f: f.resident_gib_min),
    }
    costs = _costs(run, arm)
    loops = _loops(costs)
    values |= {figure: found for figure, found in loops.items() if found}
    if arm == control:
        return values
    # If nothing is freed, nothing can come back, and there is no SETTLE.
    settle_s = _mean_settle_s(costs)
    if settle_s or any(row.footprint and row.footprint.returned for row in run.footprints):
        values[Figure.SETTLE] = settle_s
    took_s = step_s(costs)
    has_steps = not took_s or any(took_s.values())
    if control:
        of_control = _costs(run, control)
        values[Figure.SAVED] = _minus(
            _memory(run, control, lambda f: f.mean_resident_bytes), resident
        )
        if has_steps:
            values[Figure.SLOWDOWN] = _minus(logs(took_s), logs(step_s(of_control)))
        values[Figure.HOST_CPU] = _minus(
            by_trial(costs, lambda c: c.host_cpu_s), by_trial(of_control, lambda c: c.host_cpu_s)
        )
    return values


def _memory(run: RunRows, arm: str, value: Callable[[Footprint], float]) -> _Values:
    return sum_by_trial(
        (row.repetition, value(row.footprint))
        for row in run.footprints
        if row.arm == arm and row.footprint and not row.guest
    )


def _costs(run: RunRows, arm: str) -> list[CostRow]:
    return [row for row in run.costs if row.arm == arm]


def _loops(costs: Sequence[CostRow]) -> dict[Figure, _Values]:
    """Return LOOP_RATE and ALLOCATION_P99, each by repetition, of all loops of a trial together; a
    figure without values is empty."""
    parts: dict[Hashable, list[LoopSum]] = {}
    for row in costs:
        parts.setdefault(row.repetition, []).extend(row.cost.loops if row.cost else ())
    loops = {trial: summed(found) for trial, found in parts.items() if found}

    def values(name: str, unit: float = 1.0) -> _Values:
        found = {trial: LOOP_FIGURES[name](one) for trial, one in loops.items()}
        return {trial: value / unit for trial, value in found.items() if value is not None}

    return {
        Figure.LOOP_RATE: values("bytes_per_s"),
        Figure.ALLOCATION_P99: values("allocation_p99_us", _US_PER_MS),
    }


def _mean_settle_s(costs: Sequence[CostRow]) -> _Values:
    """Return the mean settle time of each trial that has settle times."""
    counts = by_trial(costs, lambda c: len(c.settle_s))
    sums = by_trial(costs, lambda c: math.fsum(c.settle_s))
    return {trial: sums[trial] / count for trial, count in counts.items() if count}


def _minus(values: _Values, others: _Values) -> _Values:
    return {trial: value - others[trial] for trial, value in values.items() if trial in others}


def _change(
    name: str, figure: Figure, first: _Arm | None, second: _Arm | None, first_look: int
) -> Change:
    undecided = _undecided("first", first, figure) or _undecided("second", second, figure)
    if undecided or first is None or second is None:
        return Change(arm=name, figure=figure, undecided=undecided, first_look=first_look)
    before, after = first.values[figure], second.values[figure]
    pairs = tuple((value, after[trial]) for trial, value in before.items() if trial in after)
    if len(pairs) < (needed := max(2, first_look)):
        undecided = f"an interval needs {needed} repetitions that both runs have"
        return Change(arm=name, figure=figure, undecided=undecided, first_look=first_look)
    return Change(arm=name, figure=figure, pairs=pairs, first_look=first_look)


def _undecided(run: str, arm: _Arm | None, figure: Figure) -> str:
    """Return why the figure of the arm in this run cannot be compared; empty if it can."""
    if arm is None:
        return f"{run} run: no trial of this arm has ended"
    if arm.undecided:
        return f"{run} run: {arm.undecided}"
    count, expected = len(arm.values.get(figure, ())), max(map(len, arm.values.values()))
    if count < expected:
        return f"{run} run: {count} of {expected} repetitions have the figure {figure}"
    return ""


def _percent_of_first(pairs: Sequence[tuple[float, float]], first_look: int) -> Interval | None:
    """Return the mean second value minus the mean first, in percent of the mean first value.

    The interval is Fieller's: it holds all p for which 0 is in the 95 % interval of
    second - (1 + p) * first. So it also covers the noise of the first value (E. C. Fieller,
    "Some problems in interval estimation", J. R. Stat. Soc. B 16, 1954).

    :returns: None if the interval of the first value is not above 0, or if there are too few pairs
        for an interval (`mean_interval`).
    """
    first = mean_interval([first for first, _ in pairs], first_look)
    second = mean_interval([second for _, second in pairs], first_look)
    change = mean_interval([second - first for first, second in pairs], first_look)
    if first is None or second is None or change is None:
        return None
    # With m for means and h for half widths, the ends are the roots p of
    # (m_change - p * m_first)^2 = h_change^2 - 2 * p * both + p^2 * h_first^2.
    # `both` is the covariance of first and change, scaled as the squares of the half widths are.
    squares = [((i.high - i.low) / 2) ** 2 for i in (first, second, change)]
    both = (squares[1] - squares[0] - squares[2]) / 2
    a = first.mean**2 - squares[0]
    if first.mean <= 0 or a <= 0:  # the interval of the first value begins at 0 or below
        return None
    b = first.mean * change.mean - both
    c = change.mean**2 - squares[2]
    root = math.sqrt(max(b * b - a * c, 0.0))
    mean, low, high = (100 * p for p in (change.mean / first.mean, (b - root) / a, (b + root) / a))
    return replace(change, mean=mean, low=low, high=high)

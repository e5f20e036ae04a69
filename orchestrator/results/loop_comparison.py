"""Computes what loops measured under each arm of a run, and compares it with the control. Pure.

As in `comparison`, each repetition is one pair: the arm's trial and the control's, each with the
loops of all its guests together. So a percentile is one of all guests, and its interval is over
repetitions. An arm has no figures if one of its trials is undecided, lost or was cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from hintfleet.sketch import Sketch
from orchestrator.results.comparison import CostRow
from orchestrator.results.loops import LoopSum, summed
from orchestrator.results.statistics import Interval, ratio_percent


@dataclass(frozen=True, kw_only=True)
class LoopFigure:
    """A figure of an arm.

    :ivar mean: over trials.
    :ivar more_percent: how much more the figure is than under the control, a geometric mean; None
        for the control, without a control whose trials all count, and with too few pairs.
    """

    mean: float
    more_percent: Interval | None


@dataclass(frozen=True, kw_only=True)
class ArmLoops:
    """What loops of one title measured under one arm. A figure without values is None.

    :ivar title: of their steps, for example `churn 64 MiB`.
    :ivar cycles: the mean for one guest and one trial.
    :ivar allocation_p50_us, allocation_p99_us: how long it took to allocate an extent of 2 MiB and
        to write to it for the first time.
    :ivar bytes_per_s: in one guest: touched bytes, divided by the time that the loops lasted.
    :ivar bytes_per_s_p1: the rate that the slowest 1 % of all parts of at least 100 ms do not
        exceed.
    """

    arm: str
    title: str
    kind: str
    cycles: LoopFigure | None
    allocation_p50_us: LoopFigure | None
    allocation_p99_us: LoopFigure | None
    bytes_per_s: LoopFigure | None
    bytes_per_s_p1: LoopFigure | None


LOOP_FIGURES: Mapping[str, Callable[[LoopSum], float | None]] = {
    "cycles": lambda one: one.cycles / one.guests,
    "allocation_p50_us": lambda one: one.allocation_us.quantile(0.5),
    "allocation_p99_us": lambda one: one.allocation_us.quantile(0.99),
    "bytes_per_s": lambda one: one.touched_bytes / one.loop_s if one.loop_s else None,
    "bytes_per_s_p1": lambda one: one.bytes_per_s.quantile(0.01),
}
"""The figures of `ArmLoops`, from the loops of one trial."""

_Trials = dict[Hashable, LoopSum]


def compare_loops(rows: Sequence[CostRow]) -> list[ArmLoops]:
    """Return what loops measured: for each title, a row for each arm whose trials all count.

    Arms are in the order of `rows`: from the store, the control is first.
    """
    left_out = {row.arm for row in rows if not row.counts}
    controls = {row.arm for row in rows if row.is_control}
    first_look = max((row.first_look for row in rows), default=0)
    found = []
    for title, arms in _by_title(rows).items():
        control = next((trials for arm, trials in arms.items() if arm in controls - left_out), {})
        for arm, trials in arms.items():
            if arm not in left_out:
                kind = next(iter(trials.values())).kind
                figures = _figures(trials, {} if arm in controls else control, first_look)
                found.append(ArmLoops(arm=arm, title=title, kind=kind, **figures))
    return found


def allocation_times(rows: Sequence[CostRow]) -> dict[str, dict[str, Sketch]]:
    """Return how long allocations took, in microseconds, by the title of loops that allocate and by
    arm: those of all guests in all trials. Without arms that `compare_loops` leaves out."""
    left_out = {row.arm for row in rows if not row.counts}
    found: dict[str, dict[str, Sketch]] = {}
    for title, arms in _by_title(rows).items():
        for arm, trials in arms.items():
            times_us = Sketch.merged(loops.allocation_us for loops in trials.values())
            if times_us.total and arm not in left_out:
                found.setdefault(title, {})[arm] = times_us
    return found


def _by_title(rows: Sequence[CostRow]) -> dict[str, dict[str, _Trials]]:
    """Return the loops of all hosts together, by title, arm and repetition."""
    parts: dict[tuple[str, str, int], list[LoopSum]] = {}
    for row in rows:
        for loops in row.cost.loops if row.cost else ():
            parts.setdefault((loops.title, row.arm, row.repetition), []).append(loops)
    by_title: dict[str, dict[str, _Trials]] = {}
    for (title, arm, repetition), of_trial in parts.items():
        by_title.setdefault(title, {}).setdefault(arm, {})[repetition] = summed(of_trial)
    return by_title


def _figures(trials: _Trials, control: _Trials, first_look: int) -> dict[str, LoopFigure | None]:
    return {
        name: _figure(trials, control, value, first_look) for name, value in LOOP_FIGURES.items()
    }


def _figure(
    trials: _Trials,
    control: _Trials,
    value: Callable[[LoopSum], float | None],
    first_look: int,
) -> LoopFigure | None:
    found, compared = _values(trials, value), _values(control, value)
    if not found:
        return None
    return LoopFigure(
        mean=math.fsum(found.values()) / len(found),
        more_percent=ratio_percent(compared, found, first_look),
    )


def _values(trials: _Trials, value: Callable[[LoopSum], float | None]) -> dict[Hashable, float]:
    values = {trial: value(loops) for trial, loops in trials.items()}
    return {trial: found for trial, found in values.items() if found is not None}

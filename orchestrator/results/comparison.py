"""Computes what each arm of a run cost: some figures compared with the control, others of the arm
alone (`ArmCost`). Pure.

In a comparison, as in `savings`, each repetition is one pair: the arm's trial and the control's,
each summed over its hosts. An arm is not in the result if one of its trials is undecided, lost or
was cut off; trials of pairs that are left out do not matter (`savings.counted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from hintfleet.settings import Driver
from orchestrator.results.cost import Cost
from orchestrator.results.savings import counted
from orchestrator.results.statistics import (
    Interval,
    mean_interval,
    paired_differences,
    ratio_percent,
    sum_by_trial,
)


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """The cost of one host in one trial.

    :ivar cost: None if the host was not measured, or the trial was cut off.
    :ivar undecided: why the trial does not count, for example wrong pages; empty if it counts
        or was cut off.
    :ivar first_look, left_out: as in `savings.FootprintRow`.
    """

    arm: str
    is_control: bool
    repetition: int
    host: str
    cost: Cost | None
    undecided: str = ""
    first_look: int = 0
    left_out: bool = False

    @property
    def counts(self) -> bool:
        """Whether the cost may enter a comparison."""
        return self.cost is not None and not self.undecided and not self.left_out


@dataclass(frozen=True, kw_only=True)
class ArmCost:
    """The cost of an arm.

    `slowdown_percent`, `guest_cpu_s` and `host_cpu_s` are comparisons with the control: hosts
    are summed in each trial, then the mean over pairs of trials is taken. They are None if there
    are too few pairs (`statistics.mean_interval`). All other values are about the arm alone.

    :ivar settle_s: the mean of all times in `Cost.settle_s`: how long after a free step 95 % of
        the memory that came back to the host was back. None if there are no such times.
    :ivar slowest_settle_s: the longest of these times; None if there are none.
    :ivar asked_settle_s: mean time that a Settle call took; None if there was no call.
    :ivar slowdown_percent: how much longer the workload's steps took than under the
        control; a geometric mean. Also None if all steps have a given time, as loops and blocks.
    :ivar guest_cpu_s: CPU time of the guests' agents (embedded: of the whole guest process), minus
        that under the control.
    :ivar host_cpu_s: CPU time of the guests' processes and the host agents, minus that
        under the control. Includes `guest_cpu_s`.
    :ivar observing_cpu_s: mean CPU time that a trial spent on measuring; not included in
        the other times.
    :ivar wire_bytes_per_range: None if no range was sent.
    :ivar tracker_bytes: the maximum over all guests.
    """

    arm: str
    settle_s: float | None
    slowest_settle_s: float | None
    asked_settle_s: float | None
    slowdown_percent: Interval | None
    guest_cpu_s: Interval | None
    host_cpu_s: Interval | None
    observing_cpu_s: float | None
    wire_bytes_per_range: float | None
    tracker_bytes: int


def compare(rows: Sequence[CostRow], driver: str) -> list[ArmCost]:
    """Return the cost of each arm whose trials all count, except the control. Trials of left-out
    pairs do not matter (`counted`).

    Arms are in the order of `rows`. If there is no control whose trials all count, all comparisons
    with the control are None.
    """
    arms: dict[str, list[CostRow]] = {}
    for row in counted(rows):
        arms.setdefault(row.arm, []).append(row)
    whole = {name: arm for name, arm in arms.items() if all(row.counts for row in arm)}
    control = next((arm for arm in whole.values() if arm[0].is_control), [])
    return [_arm_cost(arm, control, driver) for arm in whole.values() if not arm[0].is_control]


def _arm_cost(arm: Sequence[CostRow], control: Sequence[CostRow], driver: str) -> ArmCost:
    costs = [row.cost for row in arm if row.cost]
    settled = [s for cost in costs for s in cost.settle_s]
    asked = [s for cost in costs for s in cost.asked_settle_s]
    ranges = sum(cost.ranges for cost in costs)
    # The agent of an embedded guest reports no CPU time under method none, so there would be
    # nothing to compare with. The CPU time of the guest's only process is used instead.
    embedded = driver == Driver.EMBEDDED
    return ArmCost(
        arm=arm[0].arm,
        settle_s=_mean(settled),
        slowest_settle_s=max(settled, default=None),
        asked_settle_s=_mean(asked),
        slowdown_percent=_slowdown_percent(control, arm),
        guest_cpu_s=_extra(control, arm, lambda c: c.process_cpu_s if embedded else c.agent_cpu_s),
        host_cpu_s=_extra(control, arm, lambda c: c.host_cpu_s),
        observing_cpu_s=_mean(list(by_trial(arm, lambda c: c.observing_cpu_s).values())),
        wire_bytes_per_range=sum(cost.wire_bytes for cost in costs) / ranges if ranges else None,
        tracker_bytes=max(cost.tracker_bytes for cost in costs),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def by_trial(rows: Sequence[CostRow], value: Callable[[Cost], float]) -> dict[Hashable, float]:
    """Return the sum of `value` over the hosts of each trial of one arm, by repetition."""
    return sum_by_trial((row.repetition, value(row.cost)) for row in rows if row.cost)


def _extra(
    control: Sequence[CostRow], arm: Sequence[CostRow], value: Callable[[Cost], float]
) -> Interval | None:
    differences = paired_differences(by_trial(arm, value), by_trial(control, value))
    return mean_interval(differences, arm[0].first_look)


def _slowdown_percent(control: Sequence[CostRow], arm: Sequence[CostRow]) -> Interval | None:
    if not any(step_s(control).values()):
        return None
    return ratio_percent(step_s(control), step_s(arm), arm[0].first_look)


def step_s(rows: Sequence[CostRow]) -> dict[Hashable, float]:
    """Return the sum of `Cost.step_s` over the hosts of each trial of one arm, by repetition."""
    return by_trial(rows, lambda cost: cost.step_s)

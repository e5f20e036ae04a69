"""Computes how many guests fitted on hosts under each arm, in runs that start them one by one.
Pure.

A guest fits if it has done its workload, with all earlier guests still there, before the host ran
out of memory. In a comparison, as in `savings`, each repetition is one pair, summed over hosts.
Runs that vary the number of guests have the same rows; `frontier` computes their figures.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum

from orchestrator.results.statistics import (
    Interval,
    mean_interval,
    paired_differences,
    sum_by_trial,
)
from orchestrator.trial.records import Event, GuestFits, HostRanOut


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many guests fitted on one host in one trial.

    :ivar ran_out: whether the host ran out of memory before all guests of the spec fitted; if not,
        more guests might fit.
    :ivar enforced: whether a cgroup kept the guests within the host's memory budget; None if the
        host did not run out.
    """

    guests: int
    ran_out: bool
    enforced: bool | None = None


@dataclass(frozen=True, kw_only=True)
class CapacityRow:
    """The capacity of one host in one trial.

    :ivar capacity: None if the host's part of the trial was cut off, or ended without a capacity.
        It may be set in a trial that does not count.
    :ivar undecided: why the trial does not count; empty if it counts or was cut off.
    """

    arm: str
    is_control: bool
    repetition: int
    host: str
    capacity: Capacity | None
    undecided: str = ""


@dataclass(frozen=True, kw_only=True)
class ArmCapacity:
    """How many guests fitted under one arm, summed over hosts.

    :ivar guests: the mean over trials; None if `undecided` is set.
    :ivar fewest, most: of all trials; 0 if `undecided` is set.
    :ivar at_least: whether in some trial a host took all guests of the spec without running out,
        so that more guests might fit.
    :ivar more: how many more guests fitted than under the control; a lower bound with `at_least`.
        None for the control, without a control whose trials all count, if more guests might fit
        under the control, with fewer than two pairs, and if `undecided` is set.
    :ivar watched: whether some host that ran out had no cgroup: its memory was only watched.
    :ivar undecided: why there is no figure; empty otherwise.
    """

    arm: str
    is_control: bool
    trials: int
    guests: float | None = None
    fewest: int = 0
    most: int = 0
    at_least: bool = False
    more: Interval | None = None
    watched: bool = False
    undecided: str = ""


def host_capacity(events: Iterable[Event]) -> Capacity:
    """Return the capacity of a host from the events of its part of a trial."""
    found = list(events)
    out = next((event for event in found if isinstance(event, HostRanOut)), None)
    return Capacity(
        guests=sum(isinstance(event, GuestFits) for event in found),
        ran_out=out is not None,
        enforced=out.enforced if out else None,
    )


def capacities(rows: Iterable[CapacityRow]) -> list[ArmCapacity]:
    """Return the capacity of each arm, in the order in which the arms first appear in `rows`."""
    arms: dict[str, list[CapacityRow]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    control = next((arm for arm in arms.values() if arm[0].is_control), [])
    return [_arm(arm, control) for arm in arms.values()]


def _arm(rows: Sequence[CapacityRow], control: Sequence[CapacityRow]) -> ArmCapacity:
    arm = ArmCapacity(
        arm=rows[0].arm,
        is_control=rows[0].is_control,
        trials=len({row.repetition for row in rows}),
        undecided=first_undecided(rows),
    )
    if arm.undecided:
        return arm
    sums = list(guests_by_trial(rows).values())
    more = None
    if control and not (arm.is_control or first_undecided(control) or _might_fit_more(control)):
        # The arm is given as `control`: the difference is to be the arm minus the control.
        more = mean_interval(paired_differences(guests_by_trial(rows), guests_by_trial(control)))
    return ArmCapacity(
        arm=arm.arm,
        is_control=arm.is_control,
        trials=arm.trials,
        guests=fsum(sums) / len(sums),
        fewest=int(min(sums)),
        most=int(max(sums)),
        at_least=_might_fit_more(rows),
        more=more,
        watched=any(row.capacity.enforced is False for row in rows if row.capacity),
    )


def _might_fit_more(rows: Iterable[CapacityRow]) -> bool:
    """Return whether a host took all guests of the spec without running out."""
    return not all(row.capacity.ran_out for row in rows if row.capacity)


def first_undecided(rows: Iterable[CapacityRow]) -> str:
    """Return arm, repetition and reason of the first row that does not count or has no capacity;
    empty if there is no such row."""
    return next(
        (
            f"{row.arm}, repetition {row.repetition + 1}, {row.undecided or 'was cut off'}"
            for row in rows
            if row.undecided or row.capacity is None
        ),
        "",
    )


def guests_by_trial(rows: Iterable[CapacityRow]) -> dict[Hashable, float]:
    """Return how many guests fitted in each trial of one arm, by repetition, summed over hosts."""
    return sum_by_trial((row.repetition, row.capacity.guests) for row in rows if row.capacity)

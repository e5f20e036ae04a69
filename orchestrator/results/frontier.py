"""Computes how often hosts ran out of memory, by their number of guests, under each arm. Pure.

Each host of each trial is one observation: with `begin_within` in the spec, its guests begin their
workload at random times, so whether they all peak together is drawn anew for each host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.results.capacity import CapacityRow, first_undecided
from orchestrator.results.statistics import share_interval
from orchestrator.spec.model import Spec, Variant


@dataclass(frozen=True, kw_only=True)
class Point:
    """How often hosts with a number of guests ran out of memory under one arm.

    :ivar arm: its name, without the number of guests.
    :ivar guests: on each host.
    :ivar overcommit: the memory of these guests / that of their host; None if the spec does not
        say what a host has.
    :ivar hosts: how many observations there are: hosts times trials; 0 if `undecided` is set.
    :ivar ran_out: in how many of them the host ran out of memory.
    :ivar low, high: the 95 % interval of the share of hosts that run out; 0 to 1 if `undecided` is
        set.
    :ivar watched: whether some host that ran out had no cgroup: its memory was only watched.
    :ivar undecided: why there is no figure; empty otherwise.
    """

    arm: str
    guests: int
    overcommit: float | None
    hosts: int = 0
    ran_out: int = 0
    low: float = 0.0
    high: float = 1.0
    watched: bool = False
    undecided: str = ""


def frontier(rows: Iterable[CapacityRow], spec: Spec | None) -> list[Point]:
    """Return a point for each arm and number of guests, in the order of the spec.

    Empty if the number of guests is fixed (`Spec.vary` is None), or there are no rows. A point
    whose trials have not run is undecided.

    :param rows: of a run of this spec.
    :param spec: None if it cannot be read: then there are no points.
    """
    if spec is None or spec.vary is None:
        return []
    by_arm: dict[str, list[CapacityRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    return [
        _point(by_arm.get(variant.arm.name, []), variant, spec.hosts.memory_bytes)
        for variant in spec.variants
        if by_arm
    ]


def _point(rows: Sequence[CapacityRow], variant: Variant, host_bytes: int | None) -> Point:
    guests = sum(one.count for one in variant.classes)
    promised = sum(one.count * one.memory_bytes for one in variant.classes)
    overcommit = promised / host_bytes if host_bytes else None
    reason = first_undecided(rows) if rows else f"{variant.arm.name} has not run"
    if reason:
        return Point(
            arm=variant.method_name, guests=guests, overcommit=overcommit, undecided=reason
        )
    found = [row.capacity for row in rows if row.capacity]
    ran_out = sum(capacity.ran_out for capacity in found)
    low, high = share_interval(ran_out, len(found))
    return Point(
        arm=variant.method_name,
        guests=guests,
        overcommit=overcommit,
        hosts=len(found),
        ran_out=ran_out,
        low=low,
        high=high,
        watched=any(capacity.enforced is False for capacity in found),
    )


def most_without_running_out(points: Iterable[Point]) -> Point | None:
    """Return the point of one arm with the most guests such that it and all points with fewer
    guests are decided, and no host ran out in any of them; None if there is no such point."""
    found = None
    for point in sorted(points, key=lambda one: one.guests):
        if point.undecided or point.ran_out:
            break
        found = point
    return found

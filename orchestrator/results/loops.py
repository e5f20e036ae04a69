"""Sums up what the loops of a workload measured in one trial. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hintfleet.sketch import Sketch
from orchestrator.trial.records import LoopFigures, StepDone

_US_PER_S = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LoopSum:
    """All loops of one title that some guests ran in a trial.

    :ivar title: of their steps, for example `churn 64 MiB`.
    :ivar kind: churn, fault or bandwidth.
    :ivar guests: how many guests ran them.
    :ivar loop_s: how long they lasted; the sum over guests.
    :ivar allocation_us, bytes_per_s: as in `records.LoopFigures`.
    """

    title: str
    kind: str
    guests: int
    cycles: int
    touched_bytes: int
    loop_s: float
    allocation_us: Sketch
    bytes_per_s: Sketch


def loops_of(steps: Mapping[str, Sequence[StepDone]]) -> tuple[LoopSum, ...]:
    """Return the loops of a host's guests in a trial, one sum for each title.

    :param steps: of each guest.
    """
    by_title: dict[str, list[tuple[StepDone, LoopFigures]]] = {}
    for step in (step for of_guest in steps.values() for step in of_guest):
        if step.loop:
            by_title.setdefault(step.loop.title, []).append((step, step.loop))
    return tuple(_sum(title, done) for title, done in by_title.items())


def _sum(title: str, done: Sequence[tuple[StepDone, LoopFigures]]) -> LoopSum:
    steps, loops = zip(*done, strict=True)
    return LoopSum(
        title=title,
        kind=steps[0].kind,
        guests=len({step.guest for step in steps}),
        cycles=sum(loop.cycles for loop in loops),
        touched_bytes=sum(loop.touched_bytes for loop in loops),
        loop_s=sum(step.duration_us for step in steps) / _US_PER_S,
        allocation_us=Sketch.merged(loop.allocation_us for loop in loops),
        bytes_per_s=Sketch.merged(loop.bytes_per_s for loop in loops),
    )


def summed(parts: Sequence[LoopSum]) -> LoopSum:
    """Return the sum of loops on several hosts, with title and kind of the first part.

    If the parts have several titles, a guest that ran more than one is counted more than once.
    """
    return LoopSum(
        title=parts[0].title,
        kind=parts[0].kind,
        guests=sum(part.guests for part in parts),
        cycles=sum(part.cycles for part in parts),
        touched_bytes=sum(part.touched_bytes for part in parts),
        loop_s=sum(part.loop_s for part in parts),
        allocation_us=Sketch.merged(part.allocation_us for part in parts),
        bytes_per_s=Sketch.merged(part.bytes_per_s for part in parts),
    )

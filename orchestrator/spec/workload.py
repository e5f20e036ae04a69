"""Expands the workload of a spec into steps, which each guest does one after the other."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hintfleet.units import format_size
from orchestrator.spec.guests import GuestClass
from orchestrator.spec.model import Spec
from orchestrator.spec.phases import Kind, Phase, Workload
from orchestrator.spec.recording import Recording
from orchestrator.spec.values import Amount

_TITLE_LENGTH = 60


class Point(NamedTuple):
    """How much memory to hold, from how many seconds after the start of the step on."""

    at_s: float
    held_bytes: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that a guest does, followed by a hold.

    :ivar phase_index: the index of its phase in the spec.
    :ivar amount: how much to allocate, to free or to read; of a loop, how much memory it uses.
    :ivar command: a program with its arguments; empty for other steps.
    :ivar points: replay: what to hold from when on; empty for other steps.
    :ivar limit_s: how long a loop lasts, or how long a command may take; 0 for other steps.
    :ivar pause_s: churn: how long to wait between two cycles.
    :ivar fragment_bytes: allocate: the size of the pieces; 0 for extents.
    :ivar compressible_percent: allocate: the part of each page that is zeros.
    :ivar hold_s: how long to wait after the step.
    :ivar settle: whether the guest gives back all that it can before the hold; ignored under
        method none.
    """

    phase_index: int
    kind: Kind
    amount: Amount | None = None
    command: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    limit_s: float = 0.0
    pause_s: float = 0.0
    fragment_bytes: int = 0
    compressible_percent: int = 0
    hold_s: float = 0.0
    settle: bool = False

    @property
    def title(self) -> str:
        """The step as text: `allocate 192 MiB`."""
        if self.points:
            return f"{self.kind} for {self.points[-1].at_s:.3g} s"
        if self.command:
            return f"{self.kind} {shlex.join(self.command)}"[:_TITLE_LENGTH]
        pause = f", pause {self.pause_s:g} s" if self.pause_s else ""
        pieces = f" in {format_size(self.fragment_bytes)}" if self.fragment_bytes else ""
        return f"{self.kind.replace('_', ' ')} {self.amount or ''}{pieces}{pause}".rstrip()

    def size_bytes(self, held_bytes: int, memory_bytes: int) -> int:
        """Return the bytes that the step is about, in a guest that holds `held_bytes` now."""
        if self.amount is None:
            return 0
        return self.amount.of(held_bytes if self.kind is Kind.FREE else memory_bytes)


def expand(workload: Workload, recordings: Sequence[Recording] = ()) -> tuple[Step, ...]:
    """Return the steps of a workload with its repeats expanded.

    `repeat: 3` means that all phases before it run three times in total.

    :param recordings: at least those that the workload replays.
    """
    by_name = {recording.name: recording for recording in recordings}
    steps: tuple[Step, ...] = ()
    for i, phase in enumerate(workload.phases):
        if phase.repeat is not None:
            steps = steps * phase.repeat
        else:
            points = _points(by_name[phase.replay], phase.speed or 1.0) if phase.replay else ()
            steps = (*steps, _step(i, phase, points))
    return steps


def steps_of(spec: Spec, one: GuestClass) -> tuple[Step, ...]:
    """Return the steps of each guest of a class (`Spec.classes`)."""
    return expand(one.workload, spec.recordings) if one.workload else ()


def _points(recording: Recording, speed: float) -> tuple[Point, ...]:
    began_s = recording.time_s[0]
    return tuple(
        Point(at_s=(time_s - began_s) / speed, held_bytes=used_bytes)
        for time_s, used_bytes in zip(recording.time_s, recording.used_bytes, strict=True)
    )


def step_count(workload: Workload) -> int:
    """Return the number of steps that `expand` would return, without creating them."""
    count = 0
    for phase in workload.phases:
        count = count * phase.repeat if phase.repeat is not None else count + 1
    return count


def _step(phase_index: int, phase: Phase, points: tuple[Point, ...]) -> Step:
    has_limit = phase.kind.most_s > 0
    return Step(
        phase_index=phase_index,
        kind=phase.kind,
        amount=phase.amount,
        command=phase.command or (),
        points=points,
        limit_s=phase.hold_s if has_limit else 0.0,
        pause_s=phase.pause_s or 0.0,
        fragment_bytes=phase.fragment_bytes or 0,
        compressible_percent=phase.compressible_percent or 0,
        hold_s=0.0 if has_limit else phase.hold_s,
        settle=phase.settle,
    )


def held_after(step: Step, held_bytes: int, memory_bytes: int) -> int:
    """Return the bytes that a guest should hold after a step."""
    if step.points:
        return step.points[-1].held_bytes
    size_bytes = step.size_bytes(held_bytes, memory_bytes)
    changes = {Kind.ALLOCATE: size_bytes, Kind.FREE: -size_bytes}
    return held_bytes + changes.get(step.kind, 0)


def held_during(step: Step, held_bytes: int, memory_bytes: int) -> int:
    """Return the most bytes that a guest's workload holds during a step, with those of a loop, but
    without what a program or the page cache uses.

    :param held_bytes: what it holds before the step.
    """
    if step.points:
        return max(held_bytes, *(point.held_bytes for point in step.points))
    if step.kind is Kind.ALLOCATE or step.kind.is_loop:
        return held_bytes + step.size_bytes(held_bytes, memory_bytes)
    return held_bytes


def total_allocated_bytes(steps: Sequence[Step], memory_bytes: int) -> int:
    """Return the bytes that one guest's steps allocate. A loop counts with its size, once. What the
    steps free is not subtracted."""
    return sum(_allocated_bytes(step, memory_bytes) for step in steps)


def _allocated_bytes(step: Step, memory_bytes: int) -> int:
    if not step.points:
        return held_during(step, 0, memory_bytes)
    grown = (max(0, b.held_bytes - a.held_bytes) for a, b in pairwise(step.points))
    return step.points[0].held_bytes + sum(grown)


def programs(workload: Workload) -> tuple[str, ...]:
    """Return the programs that a workload starts in its guests, each once."""
    return tuple(dict.fromkeys(phase.command[0] for phase in workload.phases if phase.command))

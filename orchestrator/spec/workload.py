"""Expands the workload of a spec into steps, which each guest does one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec.model import Phase, Workload
from orchestrator.spec.values import Amount


@dataclass(frozen=True, kw_only=True)
class Step:
    """One allocation or one free, followed by a hold.

    :ivar phase_index: the index of its phase in the spec.
    :ivar hold_s: how long to wait after the step.
    :ivar settle: whether the guest gives back all that it can before the hold; ignored under
        method none.
    """

    phase_index: int
    allocate: Amount | None = None
    free: Amount | None = None
    hold_s: float = 0.0
    settle: bool = False

    @property
    def title(self) -> str:
        """The step as text: `allocate 192 MiB`."""
        return f"allocate {self.allocate}" if self.allocate else f"free {self.free}"

    def size_bytes(self, held_bytes: int, memory_bytes: int) -> int:
        """Return the bytes to allocate or to free in a guest that holds `held_bytes` now."""
        if self.allocate is not None:
            return self.allocate.of(memory_bytes)
        return self.free.of(held_bytes) if self.free is not None else 0


def expand(workload: Workload) -> tuple[Step, ...]:
    """Return the steps of a workload with its repeats expanded.

    `repeat: 3` means that all phases before it run three times in total.
    """
    steps: tuple[Step, ...] = ()
    for i, phase in enumerate(workload.phases):
        steps = steps * phase.repeat if phase.repeat is not None else (*steps, _step(i, phase))
    return steps


def step_count(workload: Workload) -> int:
    """Return the number of steps that `expand` would return, without creating them."""
    count = 0
    for phase in workload.phases:
        count = count * phase.repeat if phase.repeat is not None else count + 1
    return count


def _step(phase_index: int, phase: Phase) -> Step:
    return Step(
        phase_index=phase_index,
        allocate=phase.allocate,
        free=phase.free,
        hold_s=phase.hold_s,
        settle=phase.settle,
    )


def held_after(step: Step, held_bytes: int, memory_bytes: int) -> int:
    """Return the bytes that a guest should hold after a step."""
    size_bytes = step.size_bytes(held_bytes, memory_bytes)
    return held_bytes + size_bytes if step.allocate is not None else held_bytes - size_bytes


def total_allocated_bytes(workload: Workload, memory_bytes: int) -> int:
    """Return the bytes of all allocations of one guest; what the steps free is not subtracted."""
    return sum(
        step.size_bytes(0, memory_bytes) for step in expand(workload) if step.allocate is not None
    )

"""Checks the guests of a spec, and what their workloads do. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hintfleet.settings import Driver
from hintfleet.units import MIB, format_size
from orchestrator.spec.guests import GuestClass, Guests
from orchestrator.spec.model import Spec
from orchestrator.spec.phases import Kind, Workload
from orchestrator.spec.problem import Path, Problem
from orchestrator.spec.workload import Step, held_after, held_during, step_count, steps_of

_MAX_STEPS = 100_000
_MAX_PIECES = 1 << 16  # a guest's workload takes some hundred bytes of its own for each piece


def guest_problems(spec: Spec) -> Iterator[Problem]:
    """Yield the problems of each class of guests. Of the steps of a workload, only the first with a
    problem is reported."""
    if isinstance(spec.guests, Guests):
        yield from _class_problems(spec, ("guests",), spec.classes[0], ())
        return
    for i, (given, one) in enumerate(zip(spec.guests, spec.classes, strict=True)):
        owner: Path = ("guests", i) if given.workload else ()
        yield from _class_problems(spec, ("guests", i), one, owner)


def usable_bytes(driver: Driver, memory_bytes: int) -> int:
    """Return the bytes that a workload may hold in a guest of this size.

    Negative if a real guest is too small for its own kernel.
    """
    if driver is Driver.EMBEDDED:
        # Subtracted: the watermarks, which the embedded allocator keeps free, and a margin.
        return memory_bytes - max(4 * MIB, memory_bytes // 32)
    # Subtracted: the guest's kernel (its struct pages take 1/64 of the memory), its services and
    # the agent.
    return memory_bytes - 128 * MIB - memory_bytes // 32


def _class_problems(spec: Spec, path: Path, one: GuestClass, owner: Path) -> Iterator[Problem]:
    """:param owner: the path of what has the workload: the class, or the spec."""
    if one.image and spec.driver is Driver.EMBEDDED:
        yield Problem(
            path=(*path, "image"),
            message="an embedded guest has no image",
            hint="run it with --driver libvirt, or remove image",
        )
    budget_bytes = spec.hosts.memory_bytes
    if budget_bytes is not None and one.memory_bytes > budget_bytes:
        yield Problem(
            path=(*path, "memory"),
            message=f"a guest of {format_size(one.memory_bytes)} is larger than its host "
            f"({format_size(budget_bytes)})",
            hint="give hosts.memory more, or guests.memory less",
        )
    if one.memory_bytes % (4 * MIB):
        yield Problem(path=(*path, "memory"), message="not a multiple of 4MiB")
    if one.workload is None:
        yield Problem(
            path=(*owner, "workload"),
            message="the key 'workload' is missing",
            hint="a class of guests may have one, too" if isinstance(spec.guests, tuple) else "",
        )
        return
    yield from _workload_problems(spec, (*owner, "workload"), one, one.workload)


def _workload_problems(
    spec: Spec, path: Path, one: GuestClass, workload: Workload
) -> Iterator[Problem]:
    phases = workload.phases
    if phases[0].repeat is not None:
        yield Problem(path=(*path, "phases", 0), message="there is no phase to repeat")
        return
    # Checked before `expand` is called: a repeat multiplies all steps before it, so the steps of a
    # few repeats of 10000 would not fit into memory.
    if step_count(workload) > _MAX_STEPS:
        yield Problem(
            path=(*path, "phases"),
            message=f"with its repeats the workload has more than {_MAX_STEPS} steps",
            hint="repeat less: a repeat multiplies all repeats before it",
        )
        return
    recorded = {recording.name for recording in spec.recordings}
    for i, phase in enumerate(phases):
        if phase.replay and phase.replay not in recorded:
            yield Problem(
                path=(*path, "phases", i, "replay"),
                message=f"there is no recording {phase.replay!r}",
            )
            return
    held_bytes = 0
    for step in steps_of(spec, one):
        step_path = (*path, "phases", step.phase_index)
        if problem := _step_problem(spec.driver, step_path, step, held_bytes, one.memory_bytes):
            yield problem
            return
        held_bytes = held_after(step, held_bytes, one.memory_bytes)


def _step_problem(
    driver: Driver, path: Path, step: Step, held_bytes: int, memory_bytes: int
) -> Problem | None:
    """Return the problem of a step in a guest that holds `held_bytes` before it; else None."""
    if step.kind.needs_kernel and driver is Driver.EMBEDDED:
        return Problem(
            path=(*path, step.kind),
            message=f"an embedded guest cannot do {step.kind}: it has no kernel of its own",
            hint="run it with --driver libvirt, or give libvirt a workload of its own (under)",
        )
    if step.kind is Kind.FREE:
        if not step.size_bytes(held_bytes, memory_bytes):
            return Problem(path=path, message="nothing is held that could be freed")
        if step.amount and (step.amount.size_bytes or 0) > held_bytes:
            return Problem(
                path=(*path, step.kind),
                message=f"{step.amount} to free, but only {format_size(held_bytes)} is held then",
                hint="free less, or a percentage",
            )
    elif step.kind is Kind.BANDWIDTH and step.size_bytes(held_bytes, memory_bytes) < 4 * MIB:
        return Problem(
            path=(*path, step.kind),
            message=f"{step.amount} is too small: it copies from one 2 MiB to another",
            hint="write at least 4MiB; more than the processor's caches have",
        )
    elif step.amount and not step.size_bytes(held_bytes, memory_bytes):
        return Problem(
            path=(*path, step.kind),
            message=f"{step.amount} is less than a page, so nothing would be done",
        )
    if step.fragment_bytes and step.size_bytes(0, memory_bytes) > _MAX_PIECES * step.fragment_bytes:
        return Problem(
            path=(*path, "fragments"),
            message=f"{step.amount} would be more than {_MAX_PIECES} pieces",
            hint="write larger fragments",
        )
    most_bytes = held_during(step, held_bytes, memory_bytes)
    usable = usable_bytes(driver, memory_bytes)
    if most_bytes > usable:
        return Problem(
            path=path,
            message=f"the workload holds {format_size(most_bytes)} here, but of a guest's "
            f"{format_size(memory_bytes)} at most {format_size(max(usable, 0))} is usable "
            f"({driver} driver)",
            hint="allocate less, or give guests.memory more",
        )
    return None

"""What must hold between the values of a spec, and between a spec and a machine.

Pure: the memory of the machine is handed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from hintfleet.units import MIB, format_size
from orchestrator.addresses import plain_text_problem
from orchestrator.spec import Driver, Method, Spec
from orchestrator.workload import expand, held_after, total_allocated_bytes

# What this version has, by driver. The kernel tracks in a real guest.
TRACKERS = {Driver.EMBEDDED: ("bitmap", "reported"), Driver.LIBVIRT: ()}
ISOLATORS = {Driver.EMBEDDED: ("embedded",), Driver.LIBVIRT: ("kmod",)}

_EMBEDDED_PROCESS_BYTES = 48 * MIB  # a guest process apart from its RAM: Python and gRPC
_QEMU_PROCESS_BYTES = 96 * MIB  # QEMU apart from the guest's RAM, TCG's translations included


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a spec.

    :ivar path: the keys and indexes that lead to the value.
    """

    path: tuple[Hashable, ...]
    message: str
    hint: str = ""


def problems(spec: Spec) -> Iterator[Problem]:
    """All that is wrong between the values of a spec; nothing if it can be run."""
    yield from _arm_problems(spec)
    yield from _tracking_problems(spec)
    yield from _host_problems(spec)
    yield from _workload_problems(spec)


def usable_bytes(driver: Driver, memory_bytes: int) -> int:
    """What a workload may hold in a guest of this size.

    An embedded guest keeps its allocator's watermarks. A real guest needs room for
    its kernel (struct pages: 1/64 of the memory), its services and the agent.
    """
    if driver is Driver.EMBEDDED:
        return memory_bytes - max(4 * MIB, memory_bytes // 32)
    return memory_bytes - 128 * MIB - memory_bytes // 32


def could_become_resident_bytes(spec: Spec) -> int:
    """The most host memory that all guests of one trial can come to use at once.

    A guest under `none` keeps what it once touched, and an allocator may touch
    other pages in each phase; so all allocations count, up to the guest's memory.
    """
    memory_bytes = spec.guests.memory_bytes
    if spec.driver is Driver.LIBVIRT:
        per_guest = memory_bytes + _QEMU_PROCESS_BYTES
    else:
        touched = total_allocated_bytes(spec.workload, memory_bytes)
        per_guest = min(touched, memory_bytes) + _EMBEDDED_PROCESS_BYTES
    return per_guest * spec.guest_count


def machine_problem(spec: Spec, available_bytes: int) -> Problem | None:
    """Whether logical hosts on one machine with so much memory left can run the spec."""
    needed_bytes = could_become_resident_bytes(spec)
    if spec.hosts.agents or needed_bytes <= available_bytes:
        return None
    return Problem(
        path=("guests", "memory"),
        message=(
            f"{spec.guest_count} guests could come to use {format_size(needed_bytes)} at once, "
            f"more memory than the machine has ({format_size(available_bytes)} available)"
        ),
        hint="fewer guests (hosts.count, guests.per_host), or a smaller workload",
    )


def _arm_problems(spec: Spec) -> Iterator[Problem]:
    controls = [i for i, arm in enumerate(spec.arms) if arm.method is Method.NONE]
    if len(spec.arms) > 1 and not controls:
        yield Problem(
            path=("arms",),
            message="no arm has method none, so there is no control to compare with",
            hint="add an arm: {name: none, method: none}",
        )
    for i in controls[1:]:
        yield Problem(
            path=("arms", i, "method"),
            message=f"{spec.arms[i].name!r} is a second control; "
            f"{spec.arms[controls[0]].name!r} has method none already",
        )
    for name, count in Counter(arm.name for arm in spec.arms).items():
        if count > 1:
            last = max(i for i, arm in enumerate(spec.arms) if arm.name == name)
            yield Problem(path=("arms", last, "name"), message=f"{name!r} names two arms")


def _tracking_problems(spec: Spec) -> Iterator[Problem]:
    for i, arm in enumerate(spec.arms):
        for key, chosen, there in (
            ("tracker", arm.tracker, TRACKERS[spec.driver]),
            ("isolator", arm.isolator, ISOLATORS[spec.driver]),
        ):
            if chosen and chosen not in there:
                yield Problem(
                    path=("arms", i, key),
                    message=f"the {spec.driver} driver has no {key} {chosen!r}",
                    hint=f"it has {', '.join(there)}" if there else f"remove {key}",
                )


def _host_problems(spec: Spec) -> Iterator[Problem]:
    for i, address in enumerate(spec.hosts.agents):
        if problem := plain_text_problem(address):
            yield Problem(path=("hosts", "agents", i), message=problem)
    budget_bytes = spec.hosts.memory_bytes
    if budget_bytes is not None and spec.guests.memory_bytes > budget_bytes:
        yield Problem(
            path=("guests", "memory"),
            message=f"a guest of {format_size(spec.guests.memory_bytes)} is larger than its host "
            f"({format_size(budget_bytes)})",
            hint="give hosts.memory more, or guests.memory less",
        )


def _workload_problems(spec: Spec) -> Iterator[Problem]:
    phases = spec.workload.phases
    memory_bytes = spec.guests.memory_bytes
    usable = usable_bytes(spec.driver, memory_bytes)
    if memory_bytes % (4 * MIB):
        yield Problem(path=("guests", "memory"), message="not a multiple of 4MiB")
    if phases[0].repeat is not None:
        yield Problem(path=("workload", "phases", 0), message="there is no phase to repeat")
        return
    held_bytes = 0
    for step in expand(spec.workload):
        path = ("workload", "phases", step.phase_index)
        if step.free is not None and not step.free.of(held_bytes):
            yield Problem(path=path, message="nothing is held that could be freed")
            return
        if step.free is not None and (step.free.size_bytes or 0) > held_bytes:
            yield Problem(
                path=(*path, "free"),
                message=f"{step.free} to free, but only {format_size(held_bytes)} is held then",
                hint="free less, or a percentage",
            )
            return
        held_bytes = held_after(step, held_bytes, memory_bytes)
        if held_bytes > usable:
            yield Problem(
                path=path,
                message=f"the workload holds {format_size(held_bytes)} here, but of a guest's "
                f"{format_size(memory_bytes)} at most {format_size(max(usable, 0))} is usable "
                f"({spec.driver} driver)",
                hint="allocate less, or give guests.memory more",
            )
            return

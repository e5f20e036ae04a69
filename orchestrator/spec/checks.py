"""Checks the values of a spec against each other, and a spec against the memory of a machine. Also
checks the addresses of its host agents.

Pure: the caller passes the available memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from hintfleet.net.addresses import ENCRYPT_HINT, address_problem, plain_text_problem
from hintfleet.settings import (
    HUGE_PAGE_ORDER,
    PARTS,
    Driver,
    IsolatorKind,
    Method,
    hinting_parts,
)
from hintfleet.system.machine_limits import Bound
from hintfleet.units import MIB, format_size
from orchestrator.spec.arms import Arm
from orchestrator.spec.memory_needs import needed_bytes
from orchestrator.spec.model import Spec, Start
from orchestrator.spec.phases import Kind
from orchestrator.spec.values import LONGEST_NAME
from orchestrator.spec.workload import (
    Step,
    held_after,
    held_during,
    step_count,
    steps_of,
)

_EMBEDDED_METHODS = (Method.NONE, Method.HINTING)
_MAX_ARMS = 100
_MAX_STEPS = 100_000
_MAX_PIECES = 1 << 16  # a guest's workload takes some hundred bytes of its own for each piece
_FEWER_GUESTS = "fewer guests (hosts.count, guests.per_host), a smaller workload"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mistake in a spec.

    :ivar path: the keys and indexes that lead to the value.
    """

    path: tuple[Hashable, ...]
    message: str
    hint: str = ""


def problems(spec: Spec) -> Iterator[Problem]:
    """Yield the problems of a spec that the model does not find; nothing if there are none.

    Of the steps of the workload, only the first with a problem is reported.
    """
    yield from _arm_problems(spec)
    yield from _precision_problems(spec)
    yield from _host_problems(spec)
    yield from _workload_problems(spec)


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


def machine_problem(spec: Spec, available: Bound[int]) -> Problem | None:
    """Return the problem if the available memory is not enough to run the spec; else None."""
    needed = needed_bytes(spec)
    if needed <= available.value:
        return None
    who, remedy = f"{spec.guest_count} guests, their host agents and Ray", _FEWER_GUESTS
    if spec.hosts.agents:
        who, remedy = "this command and Ray", "end another large program"
    return Problem(
        path=("hosts", "agents") if spec.hosts.agents else ("guests", "memory"),
        message=f"{who} could need {format_size(needed)} at once, more memory than is available "
        f"({format_size(available.value)} available {available.where})",
        hint=remedy + available.or_raise,
    )


def hosts_problem(spec: Spec, *, encrypted: bool) -> Problem | None:
    """Return the problem of the first host agent that needs TLS, if there is no TLS; else None.

    A host agent needs TLS if its address is neither a unix socket nor on loopback.

    :param encrypted: whether there is TLS.
    """
    for i, agent in enumerate(spec.hosts.agents):
        if not encrypted and (problem := plain_text_problem(agent.address)):
            return Problem(path=("hosts", "agents", i), message=problem, hint=ENCRYPT_HINT)
    return None


def _arm_problems(spec: Spec) -> Iterator[Problem]:
    running = [(i, arm) for i, arm in enumerate(spec.arms) if arm.runs_under(spec.driver)]
    arms = [(i, one) for i, arm in running for one in arm.swept()]
    if len(arms) > _MAX_ARMS:
        yield Problem(
            path=("arms",),
            message=f"with what they sweep, there are {len(arms)} arms; at most {_MAX_ARMS}",
            hint="sweep fewer values",
        )
        return
    if not arms:
        yield Problem(
            path=("arms",),
            message=f"no arm runs under the {spec.driver} driver",
            hint="choose another driver, or add it to an arm's drivers",
        )
    yield from _control_problems(arms)
    yield from _name_problems(arms)
    yield from _swap_problems(spec, arms)
    for i, arm in arms:
        yield from _driver_problems(spec.driver, i, arm)
        if arm.method is Method.HINTING:
            yield from _hinting_problems(spec.driver, i, arm)


def _control_problems(arms: list[tuple[int, Arm]]) -> Iterator[Problem]:
    controls = [(i, arm.name) for i, arm in arms if arm.is_control]
    if len(arms) > 1 and not controls:
        yield Problem(
            path=("arms",),
            message="no arm has method none, so there is no control to compare with",
            hint="add an arm: {name: none, method: none}",
        )
    for i, name in controls[1:]:
        yield Problem(
            path=("arms", i, "method"),
            message=f"{name!r} is a second control; {controls[0][1]!r} has method none already",
        )


def _swap_problems(spec: Spec, arms: list[tuple[int, Arm]]) -> Iterator[Problem]:
    for i, arm in arms:
        if arm.swap and spec.hosts.count != 1:
            yield Problem(
                path=("arms", i, "swap"),
                message="the swap of a machine is shared by all hosts on it",
                hint="hosts: {count: 1, memory: ...}",
            )
        if arm.swap and spec.guests.start is not Start.ONE_BY_ONE:
            yield Problem(
                path=("arms", i, "swap"),
                message="what is swapped out counts as resident, so nothing would be saved by it",
                hint="ask how many guests fit: guests: {start: one by one, ...}",
            )


def _name_problems(arms: list[tuple[int, Arm]]) -> Iterator[Problem]:
    for name, count in Counter(arm.name for _, arm in arms).items():
        if count > 1:
            last = max(i for i, arm in arms if arm.name == name)
            yield Problem(path=("arms", last, "name"), message=f"{name!r} names two arms")
        if len(name) > LONGEST_NAME:
            yield Problem(
                path=("arms", next(i for i, arm in arms if arm.name == name), "name"),
                message=f"{name!r} is longer than {LONGEST_NAME} characters",
                hint="the values that are swept become a part of the name: choose a shorter one",
            )


def _driver_problems(driver: Driver, i: int, arm: Arm) -> Iterator[Problem]:
    if driver is not Driver.EMBEDDED:
        return
    if arm.method not in _EMBEDDED_METHODS:
        yield Problem(
            path=("arms", i, "method"),
            message=f"method {arm.method} needs real guests, but the driver is {driver}",
            hint="run it with --driver libvirt, or leave the arm out under other drivers with "
            "drivers: [libvirt]",
        )
    if arm.kernel_parameters:
        yield Problem(
            path=("arms", i, "kernel_parameters"),
            message="an embedded guest has no kernel",
            hint="leave the arm out with drivers: [libvirt], or remove kernel_parameters",
        )


def _hinting_problems(driver: Driver, i: int, arm: Arm) -> Iterator[Problem]:
    parts = hinting_parts(driver, arm.isolator, arm.tracker)
    if parts is None:
        yield _no_such_parts(driver, i, arm)
        return
    if parts.isolator is IsolatorKind.HUGETLB and arm.chunk_order != HUGE_PAGE_ORDER:
        yield Problem(
            path=("arms", i, "chunk_order"),
            message=f"isolator hugetlb supports only huge pages of order {HUGE_PAGE_ORDER}",
        )


def _no_such_parts(driver: Driver, i: int, arm: Arm) -> Problem:
    isolators, trackers = zip(*PARTS[driver], strict=True)
    for key, chosen, supported in (
        ("tracker", arm.tracker, trackers),
        ("isolator", arm.isolator, isolators),
    ):
        if chosen and chosen not in supported:
            return Problem(
                path=("arms", i, key),
                message=f"the {driver} driver has no {key} {chosen!r}",
                hint=f"it has {', '.join(dict.fromkeys(supported))}",
            )
    return Problem(
        path=("arms", i, "tracker"),
        message=f"isolator {arm.isolator} does not work with tracker {arm.tracker}",
        hint=f"{driver} has "
        + ", ".join(f"{isolator} with {tracker}" for isolator, tracker in PARTS[driver]),
    )


def _precision_problems(spec: Spec) -> Iterator[Problem]:
    if spec.precision is None:
        if spec.max_repetitions is not None:
            yield Problem(
                path=("max_repetitions",),
                message="max_repetitions is only for a run that stops by its precision",
                hint="add a precision, for example precision: 5%, or give repetitions instead",
            )
        return
    if spec.guests.start is Start.ONE_BY_ONE:
        yield Problem(
            path=("precision",),
            message="precision is about savings, but with guests started one by one the figure is "
            "how many fit",
            hint="remove precision, and give repetitions",
        )
    if len(spec.trial_arms) < 2:  # with more arms, _control_problems finds a missing control
        yield Problem(
            path=("precision",),
            message="precision is about what an arm saves compared with the control, but there is "
            "only one arm",
            hint="add an arm, or remove precision",
        )
    if spec.max_repetitions is None:
        yield Problem(
            path=("precision",),
            message="max_repetitions is missing",
            hint="say when to stop without the precision, for example max_repetitions: 20",
        )
    elif spec.max_repetitions < spec.repetitions:
        yield Problem(
            path=("max_repetitions",),
            message=f"{spec.repetitions} repetitions always run, so this is too few",
            hint="give max_repetitions more, or repetitions less",
        )
    if spec.repetitions < 2:
        yield Problem(
            path=("precision",),
            message="an interval needs two repetitions, but only one always runs",
            hint="give the number of repetitions before the first look, for example repetitions: 3",
        )


def _host_problems(spec: Spec) -> Iterator[Problem]:
    for i, agent in enumerate(spec.hosts.agents):
        if problem := address_problem(agent.address):
            yield Problem(path=("hosts", "agents", i), message=problem)
    if spec.guests.image and spec.driver is Driver.EMBEDDED:
        yield Problem(
            path=("guests", "image"),
            message="an embedded guest has no image",
            hint="run it with --driver libvirt, or remove image",
        )
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
    if memory_bytes % (4 * MIB):
        yield Problem(path=("guests", "memory"), message="not a multiple of 4MiB")
    if phases[0].repeat is not None:
        yield Problem(path=("workload", "phases", 0), message="there is no phase to repeat")
        return
    # Checked before `expand` is called: a repeat multiplies all steps before it, so the steps of a
    # few repeats of 10000 would not fit into memory.
    if step_count(spec.workload) > _MAX_STEPS:
        yield Problem(
            path=("workload", "phases"),
            message=f"with its repeats the workload has more than {_MAX_STEPS} steps",
            hint="repeat less: a repeat multiplies all repeats before it",
        )
        return
    recorded = {recording.name for recording in spec.recordings}
    for i, phase in enumerate(phases):
        if phase.replay and phase.replay not in recorded:
            yield Problem(
                path=("workload", "phases", i, "replay"),
                message=f"there is no recording {phase.replay!r}",
            )
            return
    held_bytes = 0
    for step in steps_of(spec):
        if problem := _step_problem(spec, step, held_bytes):
            yield problem
            return
        held_bytes = held_after(step, held_bytes, memory_bytes)


def _step_problem(spec: Spec, step: Step, held_bytes: int) -> Problem | None:
    """Return the problem of a step in a guest that holds `held_bytes` before it; else None."""
    path = ("workload", "phases", step.phase_index)
    memory_bytes = spec.guests.memory_bytes
    if step.kind.needs_kernel and spec.driver is Driver.EMBEDDED:
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
    usable = usable_bytes(spec.driver, memory_bytes)
    if most_bytes > usable:
        return Problem(
            path=path,
            message=f"the workload holds {format_size(most_bytes)} here, but of a guest's "
            f"{format_size(memory_bytes)} at most {format_size(max(usable, 0))} is usable "
            f"({spec.driver} driver)",
            hint="allocate less, or give guests.memory more",
        )
    return None

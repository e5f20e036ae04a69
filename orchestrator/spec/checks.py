"""Checks the values of a spec against each other, and a spec against the memory of a machine. Also
checks the addresses of its host agents.

Pure: the caller passes the available memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

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
from hintfleet.units import format_size
from orchestrator.spec.arms import Arm
from orchestrator.spec.guest_checks import guest_problems
from orchestrator.spec.guests import Guests
from orchestrator.spec.memory_needs import needed_bytes
from orchestrator.spec.model import Spec
from orchestrator.spec.problem import Problem
from orchestrator.spec.switchback_checks import switchback_problems
from orchestrator.spec.values import LONGEST_NAME

_EMBEDDED_METHODS = (Method.NONE, Method.HINTING)
_MAX_ARMS = 100
_FEWER_GUESTS = "fewer guests (hosts.count, guests.per_host), a smaller workload"


def problems(spec: Spec) -> Iterator[Problem]:
    """Yield the problems of a spec that the model does not find; nothing if there are none."""
    if spec.switchback is None and "guests" not in spec.model_fields_set:
        yield Problem(path=("guests",), message="the key 'guests' is missing")
        return
    yield from _arm_problems(spec)
    yield from _vary_problems(spec)
    yield from _precision_problems(spec)
    yield from _host_problems(spec)
    if spec.switchback:
        yield from switchback_problems(spec, spec.switchback)
    else:
        yield from guest_problems(spec)


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
    if len(spec.variants) > _MAX_ARMS:
        yield Problem(
            path=("arms",),
            message=f"with what is swept and varied, there are {len(spec.variants)} arms; at most "
            f"{_MAX_ARMS}",
            hint="sweep or vary fewer values",
        )
        return
    if not arms:
        yield Problem(
            path=("arms",),
            message=f"no arm runs under the {spec.driver} driver",
            hint="choose another driver, or add it to an arm's drivers",
        )
    yield from _control_problems(arms)
    endings = [f"-{number}" for number in spec.vary.per_host] if spec.vary else [""]
    yield from _name_problems([(i, arm.name + ending) for i, arm in arms for ending in endings])
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
        if arm.swap and not spec.asks_how_many:
            yield Problem(
                path=("arms", i, "swap"),
                message="what is swapped out counts as resident, so nothing would be saved by it",
                hint="ask how many guests fit: guests: {start: one by one, ...}",
            )


def _name_problems(names: list[tuple[int, str]]) -> Iterator[Problem]:
    for name, count in Counter(name for _, name in names).items():
        if count > 1:
            last = max(i for i, other in names if other == name)
            yield Problem(path=("arms", last, "name"), message=f"{name!r} names two arms")
        if len(name) > LONGEST_NAME:
            yield Problem(
                path=("arms", next(i for i, other in names if other == name), "name"),
                message=f"{name!r} is longer than {LONGEST_NAME} characters",
                hint="values that are swept or varied become a part of the name: choose a shorter "
                "one",
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
    if spec.asks_how_many:
        yield Problem(
            path=("precision",),
            message="precision is about savings, but with guests started one by one, or a varied "
            "number of guests, the figure is how many a host can run",
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


def _vary_problems(spec: Spec) -> Iterator[Problem]:
    if spec.vary is None:
        return
    if not isinstance(spec.guests, Guests):
        yield Problem(
            path=("vary",),
            message="the number of guests can only vary if all are alike",
            hint="write guests as a mapping: guests: {per_host: 8, memory: 256MiB}",
        )
        return
    if spec.one_by_one:
        yield Problem(
            path=("vary",),
            message="guests that start one by one find out how many fit by themselves",
            hint="remove vary, or start",
        )

"""The frozen model of an experiment; spec files are read into it.

Each part of a spec is checked here on its own. `spec/checks.py` checks parts against each other,
and `spec/file.py` adds lines and columns to errors. Sizes are integer bytes, durations are
seconds.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hintfleet.settings import (
    Driver,
)
from hintfleet.units import format_size
from orchestrator.spec.arms import Arm
from orchestrator.spec.guests import (
    GuestClass,
    Guests,
    GuestsOrClasses,
    Start,
    Vary,
    classes_of,
)
from orchestrator.spec.phases import Workload
from orchestrator.spec.recording import Recording
from orchestrator.spec.switchback import Switchback
from orchestrator.spec.values import (
    AmountOrPercent,
    DurationS,
    Name,
    Part,
    PositiveDurationS,
    Repetitions,
    SamplePeriodS,
    Size,
    invalid_value,
)


class Agent(Part):
    """A host agent that runs already; in a spec, its address alone or a mapping.

    :ivar node: the node of a Ray cluster that it is on, by name, hostname, IP address or Ray's id.
        Needed if the address is a unix socket or on loopback, and the cluster has several nodes;
        else may be empty.
    """

    address: str
    node: str = ""

    @model_validator(mode="before")
    @classmethod
    def _address_alone(cls, value: Any) -> Any:
        return {"address": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _node_is_one_word(self) -> Agent:
        if re.search(r"[\s,=]", self.node):
            raise invalid_value(
                f"{self.node!r} is not the name of a node", "a name has no space, comma or '='"
            )
        return self

    @model_serializer(mode="wrap")
    def _address_alone_again(self, serialize: SerializerFunctionWrapHandler) -> Any:
        # So that a spec that names no nodes keeps the hash that it had before `node` existed.
        return serialize(self) if self.node else self.address


class Hosts(Part):
    """The hosts under test.

    Either `count` logical hosts on the machines that run the experiment, or the host agents
    `agents`.

    :ivar memory_bytes: the memory budget of each logical host.
    """

    count: int | None = Field(default=None, ge=1, le=1000)
    memory_bytes: Size | None = Field(default=None, alias="memory")
    agents: tuple[Agent, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Hosts:
        if bool(self.agents) == (self.count is not None):
            raise invalid_value("hosts must have either count and memory, or agents")
        if self.count is not None and self.memory_bytes is None:
            raise invalid_value(
                "memory is missing", "give the memory of each host, for example memory: 1GiB"
            )
        if self.agents and self.memory_bytes is not None:
            raise invalid_value("agents have their own memory budget", "remove memory")
        if len(set(self.agents)) < len(self.agents):
            raise invalid_value("the same agent is listed twice")
        return self

    @property
    def number(self) -> int:
        """The number of hosts."""
        return self.count or len(self.agents)


class Timeouts(Part):
    """Deadlines for starting or reaching a host agent, and for the calls to it.

    :ivar nodes_s: how long to wait until a Ray cluster has nodes for all hosts.
    """

    nodes_s: DurationS = Field(default=30.0, alias="nodes")
    connect_s: PositiveDurationS = Field(default=30.0, alias="connect")
    create_s: PositiveDurationS = Field(default=180.0, alias="create")
    step_s: PositiveDurationS = Field(default=120.0, alias="step")
    settle_s: PositiveDurationS = Field(default=60.0, alias="settle")
    destroy_s: PositiveDurationS = Field(default=60.0, alias="destroy")


class UnderDriver(Part):
    """Keys that replace those of the spec under one driver. None: this key is not replaced."""

    LATER = frozenset({"vary"})

    hosts: Hosts | None = None
    guests: GuestsOrClasses | None = None
    vary: Vary | None = None
    workload: Workload | None = None
    repetitions: Repetitions | None = None
    precision: AmountOrPercent | None = None
    max_repetitions: Repetitions | None = None
    sample_period_s: SamplePeriodS | None = Field(default=None, alias="sample_period")
    timeouts: Timeouts | None = None


class Under(Part):
    """For each driver, the keys that replace those of the spec."""

    embedded: UnderDriver | None = None
    libvirt: UnderDriver | None = None


class Variant(NamedTuple):
    """What a trial runs.

    :ivar arm: with a name of its own, also if the arm of the spec stands for several.
    :ivar method_name: the name of the arm without the number of guests.
    :ivar classes: the guests of each host.
    """

    arm: Arm
    method_name: str
    classes: tuple[GuestClass, ...]


class Spec(Part):
    """An experiment under one driver.

    :ivar vary: each arm runs with each of these numbers of guests, and the figure is how many
        hosts run out of memory. None if the number is fixed.
    :ivar workload: what guests do whose class has no workload of its own; None if each has.
    :ivar switchback: of guests that are there already: then `guests` is empty, and `workload` None.
        None for guests that are made for the experiment.
    :ivar arms: all arms, also those that do not run under this driver.
    :ivar repetitions: how many run; with `precision`, how many run at least.
    :ivar precision: repetitions go on until the half width of the interval of each arm's savings
        is at most this: a percentage of the control's mean resident memory, or a size. None if
        the number of repetitions is fixed.
    :ivar max_repetitions: how many run at most; set if `precision` is.
    :ivar under: as in the file. The part for this driver is merged into the other fields already.
    :ivar recordings: what the workload replays; those in files were read.
    """

    LATER = frozenset(
        {
            *("vary", "precision", "max_repetitions", "recordings"),
            *("guests", "workload", "switchback"),
        }
    )

    name: Name
    description: str = ""
    # strict=False: in strict mode pydantic rejects a str in place of an enum.
    driver: Annotated[Driver, Field(strict=False)]
    hosts: Hosts
    guests: GuestsOrClasses = ()
    vary: Vary | None = None
    workload: Workload | None = None
    switchback: Switchback | None = None
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=100)]
    repetitions: Repetitions = 1
    precision: AmountOrPercent | None = None
    max_repetitions: Repetitions | None = None
    seed: int = Field(default=1, ge=0, lt=1 << 63)
    sample_period_s: SamplePeriodS = Field(default=0.1, alias="sample_period")
    timeouts: Timeouts = Timeouts()
    under: Under = Under()
    recordings: Annotated[tuple[Recording, ...], Field(max_length=100)] = ()

    @property
    def classes(self) -> tuple[GuestClass, ...]:
        """The guests of each host; of the varied numbers of guests, the highest. Each class has its
        workload: its own, or that of the spec. `checks.problems` reports it if both are missing."""
        most = max(self.vary.per_host) if self.vary else None
        return self._with_workloads(classes_of(self.guests, most))

    def _with_workloads(self, classes: tuple[GuestClass, ...]) -> tuple[GuestClass, ...]:
        return tuple(
            one if one.workload else one.model_copy(update={"workload": self.workload})
            for one in classes
        )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What trials run: each arm that runs under this driver, with each number of guests. An arm
        that sweeps settings is replaced by those that it stands for."""
        running = (arm for arm in self.arms if arm.runs_under(self.driver))
        arms = [one for arm in running for one in arm.swept()]
        if self.vary is None:
            return tuple(Variant(arm, arm.name, self.classes) for arm in arms)
        return tuple(
            Variant(
                arm.model_copy(update={"name": f"{arm.name}-{number}"}),
                arm.name,
                self._with_workloads(classes_of(self.guests, number)),
            )
            for arm in arms
            for number in self.vary.per_host
        )

    @property
    def trial_arms(self) -> tuple[Arm, ...]:
        """The arms that run under this driver; for an arm that stands for several, all of them."""
        return tuple(variant.arm for variant in self.variants)

    @property
    def one_by_one(self) -> bool:
        """Whether guests are started one by one, until the host runs out of memory or all run."""
        return isinstance(self.guests, Guests) and self.guests.start is Start.ONE_BY_ONE

    @property
    def asks_how_many(self) -> bool:
        """Whether the figure is how many guests a host can run (with `vary`: how often hosts run
        out of memory with each number); else it is the memory that guests use."""
        return self.one_by_one or self.vary is not None

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of the arms that do not run under this driver.

        A name is not among them if another arm with the same name runs.
        """
        # Two arms may share a name if they run under different drivers (methods.yaml: bitmap).
        running = {arm.name for arm in self.arms if arm.runs_under(self.driver)}
        return tuple(arm.name for arm in self.arms if arm.name not in running)

    @property
    def control(self) -> str | None:
        """The name of the control under this driver; None if there is none, or if there are several
        because the number of guests varies."""
        if self.vary:
            return None
        return next((arm.name for arm in self.trial_arms if arm.is_control), None)

    @property
    def most_repetitions(self) -> int:
        """The number of repetitions that run at most; `repetitions` if their number is fixed."""
        return self.max_repetitions or self.repetitions

    @property
    def guests_per_host(self) -> int:
        """The most guests that run on a host at once; 0 for a switchback."""
        return sum(one.count for one in self.classes)

    @property
    def guest_count(self) -> int:
        """The most guests that run at once, on all hosts together; 0 for a switchback."""
        return self.hosts.number * self.guests_per_host


def describe(spec: Spec) -> str:
    """Return the size of an experiment as text, in one line.

    For example `embedded, 2 hosts x 3 guests of 256 MiB, 2 arms, 3 repetitions`; with a precision
    `3 to 20 repetitions, until ±5 %`.
    """
    repetitions = _count(spec.repetitions, "repetition")
    if spec.precision:
        most = _count(spec.most_repetitions, "repetition")
        repetitions = f"{spec.repetitions} to {most}, until ±{spec.precision}"
    arms = len(spec.trial_arms) // (len(spec.vary.per_host) if spec.vary else 1)
    return (
        f"{spec.driver}, {_count(spec.hosts.number, 'host')} × {_guests(spec)}, "  # noqa: RUF001
        f"{_count(arms, 'arm')}, {repetitions}"
    )


def _guests(spec: Spec) -> str:
    if spec.switchback:
        return spec.switchback.summary
    if spec.vary:
        numbers = sorted(spec.vary.per_host)
        return f"{numbers[0]} to {_of_class(spec.classes[0])}"
    each = " and ".join(map(_of_class, spec.classes))
    return f"up to {each}" if spec.one_by_one else each


def _of_class(one: GuestClass) -> str:
    return f"{_count(one.count, 'guest')} of {format_size(one.memory_bytes)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

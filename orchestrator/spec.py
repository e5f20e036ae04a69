"""What an experiment is: the frozen model behind a spec file.

Only what can be said about one value at a time is checked here; what concerns
several values is in `spec_checks`, and lines and columns are added by
`spec_file`. Sizes are integer bytes, durations seconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hintfleet.errors import InvalidInput
from hintfleet.units import PAGE_BYTES, format_size, parse_duration_s, parse_size

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


class Driver(StrEnum):
    """What a guest is."""

    EMBEDDED = "embedded"
    LIBVIRT = "libvirt"


class Method(StrEnum):
    """How memory comes back."""

    NONE = "none"
    HINTING = "hinting"


def wrong(message: str, hint: str = "") -> PydanticCustomError:
    """An error with a hint, in the form that pydantic keeps."""
    return PydanticCustomError("hintfleet", "{message}", {"message": message, "hint": hint})


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise wrong(f"{value!r} is not a size", "write a number with a unit, as in 384MiB")
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise wrong(error.message, error.hint) from None


def _duration_s(value: Any) -> float:
    if not isinstance(value, str):
        raise wrong(f"{value!r} is not a duration", "write a number with a unit, as in 2s")
    try:
        return parse_duration_s(value)
    except InvalidInput as error:
        raise wrong(error.message, error.hint) from None


def _amount(value: Any) -> Amount:
    if isinstance(value, str) and value.endswith("%"):
        try:
            percent = float(value[:-1])
        except ValueError:
            raise wrong(f"{value!r} is not a percentage", "write it as in 75%") from None
        if not 0 < percent <= 100:
            raise wrong(f"{value!r} is not above 0% and at most 100%")
        return Amount(percent=percent)
    size_bytes = _size(value)
    if size_bytes <= 0:
        raise wrong(f"{value!r} is not above 0")
    return Amount(size_bytes=size_bytes)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=False)


class Amount(_Part):
    """So many bytes, or a percentage of a whole that is known only later."""

    size_bytes: int | None = None
    percent: float | None = None

    def of(self, whole_bytes: int, page_bytes: int = PAGE_BYTES) -> int:
        """Bytes, whole pages, never more than `whole_bytes`."""
        if self.percent is None:
            wanted = self.size_bytes or 0
        else:
            wanted = int(whole_bytes * self.percent / 100)
        return min(wanted, whole_bytes) // page_bytes * page_bytes

    def __str__(self) -> str:
        return format_size(self.size_bytes) if self.size_bytes else f"{self.percent:g} %"


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
DurationS = Annotated[float, BeforeValidator(_duration_s), Field(ge=0, le=7 * 86400)]
PositiveDurationS = Annotated[float, BeforeValidator(_duration_s), Field(gt=0, le=7 * 86400)]
AmountOrPercent = Annotated[Amount, BeforeValidator(_amount)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=40)]
Strings = tuple[str, ...]


class Hosts(_Part):
    """The hosts under test: `count` logical ones on the machines that run the
    experiment, or the host agents that listen at `agents`.

    :ivar memory_bytes: what each logical host may promise to use.
    """

    count: int | None = Field(default=None, ge=1, le=1000)
    memory_bytes: Size | None = Field(default=None, alias="memory")
    agents: Strings = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Hosts:
        if bool(self.agents) == (self.count is not None):
            raise wrong("hosts need either count and memory, or agents")
        if self.count is not None and self.memory_bytes is None:
            raise wrong("memory is missing", "say what each host has, as in memory: 1GiB")
        if self.agents and self.memory_bytes is not None:
            raise wrong("agents bring their own memory budget", "remove memory")
        if len(set(self.agents)) < len(self.agents):
            raise wrong("an agent is named twice")
        return self

    @property
    def number(self) -> int:
        """How many hosts."""
        return self.count or len(self.agents)


class Guests(_Part):
    """The guests of every host."""

    per_host: int = Field(ge=1, le=1000)
    memory_bytes: Size = Field(alias="memory")


class Phase(_Part):
    """One step of the workload on all guests, and how long to stay there after it.

    Exactly one of `allocate` (a percentage is of the guest's memory), `free` (a
    percentage is of what is held) and `repeat` (all phases before it, so many
    times in total) is set.
    """

    allocate: AmountOrPercent | None = None
    free: AmountOrPercent | None = None
    repeat: int | None = Field(default=None, ge=1, le=10000)
    hold_s: DurationS = Field(default=0.0, alias="for")
    settle: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Phase:
        kinds = [k for k in ("allocate", "free", "repeat") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise wrong(
                f"a phase is one of allocate, free and repeat, not {' and '.join(kinds) or 'none'}",
                "start another phase with '-'",
            )
        if self.repeat is not None and (self.hold_s or self.settle):
            raise wrong("repeat takes neither for nor settle", "move them to another phase")
        return self


class Workload(_Part):
    """What every guest does, in order."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1, max_length=1000)]


class Arm(_Part):
    """One method with its settings.

    :ivar tracker: empty where the isolator brings its own.
    :ivar isolator: empty for what the driver has.
    :ivar threshold_chunks: free chunks that make a guest hint at once.
    :ivar report_period_s: how often a guest looks for free chunks below the threshold.
    """

    name: Name
    method: Annotated[Method, Field(strict=False)]
    tracker: str = ""
    isolator: str = ""
    policy: Literal["eager"] = "eager"
    report_period_s: PositiveDurationS = Field(default=0.1, alias="report_period")
    threshold_chunks: int = Field(default=16, ge=1, le=1 << 20, alias="threshold")
    chunk_order: int = Field(default=9, ge=0, le=10)

    @model_validator(mode="after")
    def _none_has_no_settings(self) -> Arm:
        if self.method is Method.NONE:
            set_here = self.model_fields_set - {"name", "method"}
            if set_here:
                names = ", ".join(sorted(key_of(Arm, name) for name in set_here))
                raise wrong(f"method none takes no settings, but has {names}", "remove them")
        return self


class Timeouts(_Part):
    """How long an answer of a host agent may take."""

    connect_s: PositiveDurationS = Field(default=30.0, alias="connect")
    create_s: PositiveDurationS = Field(default=180.0, alias="create")
    step_s: PositiveDurationS = Field(default=120.0, alias="step")
    settle_s: PositiveDurationS = Field(default=60.0, alias="settle")
    destroy_s: PositiveDurationS = Field(default=60.0, alias="destroy")


class Spec(_Part):
    """An experiment."""

    name: Name
    description: str = ""
    driver: Annotated[Driver, Field(strict=False)]
    hosts: Hosts
    guests: Guests
    workload: Workload
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=100)]
    repetitions: int = Field(default=1, ge=1, le=10000)
    seed: int = Field(default=1, ge=0, lt=1 << 63)
    sample_period_s: Annotated[
        float, BeforeValidator(_duration_s), Field(ge=0.01, le=60, alias="sample_period")
    ] = 0.1
    timeouts: Timeouts = Timeouts()

    @property
    def control(self) -> str | None:
        """Name of the arm that all others are compared with."""
        return next((arm.name for arm in self.arms if arm.method is Method.NONE), None)

    @property
    def guest_count(self) -> int:
        """Guests that run at once."""
        return self.hosts.number * self.guests.per_host


def key_of(part: type[BaseModel], field_name: str) -> str:
    """The key in a spec file that sets this field."""
    return part.model_fields[field_name].alias or field_name


def keys_of(part: type[BaseModel]) -> tuple[str, ...]:
    """All keys that this part of a spec may have."""
    return tuple(key_of(part, name) for name in part.model_fields)


def describe(spec: Spec) -> str:
    """`embedded, 2 hosts x 3 guests of 256 MiB, 2 arms, 3 repetitions`."""
    return (
        f"{spec.driver}, {_count(spec.hosts.number, 'host')} × "  # noqa: RUF001
        f"{_count(spec.guests.per_host, 'guest')} of {format_size(spec.guests.memory_bytes)}, "
        f"{_count(len(spec.arms), 'arm')}, {_count(spec.repetitions, 'repetition')}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""Parses the values of a spec: sizes, durations and percentages.

Sizes become integer bytes, durations become seconds, and percentages become numbers: 75% is 75.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from hintfleet.errors import InvalidInput
from hintfleet.settings import (
    MAX_ORDER,
    MOST_COMPRESSIBLE_PERCENT,
    MOST_THRESHOLD_CHUNKS,
    SHORTEST_REPORT_PERIOD_MS,
    SHORTEST_SAMPLE_PERIOD_MS,
)
from hintfleet.units import MIB, PAGE_BYTES, format_size, parse_duration_s, parse_size

LONGEST_NAME = 40
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


def invalid_value(message: str, hint: str = "") -> PydanticCustomError:
    """Return an error with a hint, to be raised in a validator."""
    # Not a ValueError: pydantic keeps only its text, without the hint. The context of a custom
    # error (the third argument) is in `ValidationError.errors()`. The second argument is a
    # template: a message with braces in it would be misread there.
    return PydanticCustomError("hintfleet", "{message}", {"message": message, "hint": hint})


def _size(value: Any) -> int:
    if not isinstance(value, str):
        raise invalid_value(
            f"{value!r} is not a size", "write a number with a unit, for example 384MiB"
        )
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise invalid_value(error.message, error.hint) from None


def _duration_s(value: Any) -> float:
    if not isinstance(value, str):
        raise invalid_value(
            f"{value!r} is not a duration", "write a number with a unit, for example 2s"
        )
    try:
        return parse_duration_s(value)
    except InvalidInput as error:
        raise invalid_value(error.message, error.hint) from None


def _percent(value: Any) -> float:
    try:
        percent = float(value.removesuffix("%")) if value.endswith("%") else None
    except (AttributeError, ValueError):
        percent = None
    if percent is None:
        raise invalid_value(f"{value!r} is not a percentage", "write it like 75%")
    if not 0 < percent <= 100:
        raise invalid_value(f"{value!r} must be above 0% and at most 100%")
    return percent


def _whole_percent(value: Any) -> int:
    percent = _percent(value)
    if percent != int(percent):
        raise invalid_value(f"{value!r} is not a whole percentage", "write it like 75%")
    return int(percent)


def _fragment_size(value: Any) -> int:
    size_bytes = _size(value)
    # Smaller than a chunk of 2 MiB: so one freed fragment between two held ones is no free chunk.
    if size_bytes.bit_count() != 1 or not PAGE_BYTES <= size_bytes <= MIB:
        raise invalid_value(
            f"{value!r} must be a power of two from 4KiB to 1MiB", "write for example 64KiB"
        )
    return size_bytes


def _printable(value: str) -> str:
    # The text becomes a string in a protobuf message, an argument of a process, or part of a line
    # of output.
    if not value.isprintable():
        raise invalid_value(f"{value!r} is not printable text")
    return value


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise invalid_value("a value is there twice")
    return values


def _amount(value: Any) -> Amount:
    if not isinstance(value, str):
        raise invalid_value(
            f"{value!r} is neither a size nor a percentage", "write it like 384MiB or 75%"
        )
    if value.endswith("%"):
        return Amount(percent=_percent(value))
    size_bytes = _size(value)
    if size_bytes <= 0:
        raise invalid_value(f"{value!r} must be above 0")
    return Amount(size_bytes=size_bytes)


class Part(BaseModel):
    """A part of a spec: frozen; unknown keys are an error.

    :cvar LATER: fields that an earlier version did not have, or required. A dump is without them
        while they have their defaults: so the hash of a spec that does not use them stays the same,
        and a run of that version can be resumed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=False)
    LATER: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {
            name
            for name in self.LATER
            if getattr(self, name) == type(self).model_fields[name].default
        }
        return {name: value for name, value in dump(self).items() if name not in unused}


def key_of(part: type[BaseModel], field_name: str) -> str:
    """Return the key in a spec file that sets this field."""
    return part.model_fields[field_name].alias or field_name


def keys_of(part: type[BaseModel]) -> tuple[str, ...]:
    """Return all keys that this part of a spec may have."""
    return tuple(key_of(part, name) for name in part.model_fields)


class Amount(Part):
    """Either a size in bytes, or a percentage of a whole that is known later."""

    size_bytes: int | None = None
    percent: float | None = None

    def of(self, whole_bytes: int, page_bytes: int = PAGE_BYTES) -> int:
        """Return the amount in bytes: whole pages, rounded down, at most `whole_bytes`."""
        if self.percent is None:
            wanted = self.size_bytes or 0
        else:
            wanted = int(whole_bytes * self.percent / 100)
        return min(wanted, whole_bytes) // page_bytes * page_bytes

    def __str__(self) -> str:
        return format_size(self.size_bytes) if self.size_bytes else f"{self.percent:g} %"


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
FragmentSize = Annotated[int, BeforeValidator(_fragment_size)]
DurationS = Annotated[float, BeforeValidator(_duration_s), Field(ge=0, le=7 * 86400)]
PositiveDurationS = Annotated[float, BeforeValidator(_duration_s), Field(gt=0, le=7 * 86400)]
# ReportPeriodS, ColdAfterS and BreakEvenS are at least a millisecond: on the wire they are whole
# milliseconds, and 0 means the default.
ReportPeriodS = Annotated[
    float, BeforeValidator(_duration_s), Field(ge=SHORTEST_REPORT_PERIOD_MS / 1000, le=7 * 86400)
]
ColdAfterS = Annotated[float, BeforeValidator(_duration_s), Field(ge=0.001, le=7 * 86400)]
BreakEvenS = Annotated[float, BeforeValidator(_duration_s), Field(ge=0.001, le=86400)]
# ChunkOrder and Threshold are at least 1: on the wire 0 means the default (host.proto).
ChunkOrder = Annotated[int, Field(ge=1, le=MAX_ORDER)]
Threshold = Annotated[int, Field(ge=1, le=MOST_THRESHOLD_CHUNKS)]
WholePercent = Annotated[int, BeforeValidator(_whole_percent)]
Compressible = Annotated[WholePercent, Field(le=MOST_COMPRESSIBLE_PERCENT)]
AmountOrPercent = Annotated[Amount, BeforeValidator(_amount)]
Printable = Annotated[str, AfterValidator(_printable), Field(max_length=1000)]
Command = Annotated[tuple[Printable, ...], Field(min_length=1, max_length=100)]
FileName = Annotated[Printable, Field(min_length=1)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME)]
_T = TypeVar("_T")
Values = Annotated[tuple[_T, ...], AfterValidator(_different), Field(max_length=10)]
Repetitions = Annotated[int, Field(ge=1, le=10000)]
SamplePeriodS = Annotated[
    float, BeforeValidator(_duration_s), Field(ge=SHORTEST_SAMPLE_PERIOD_MS / 1000, le=60)
]

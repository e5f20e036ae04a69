"""The guests of an experiment, as a spec describes them. A part of the model (model.py)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from orchestrator.spec.phases import Workload
from orchestrator.spec.values import DurationS, Name, Part, Size, Values, invalid_value

PerHost = Annotated[int, Field(ge=1, le=1000)]


class Start(StrEnum):
    """When the guests of a host are started."""

    TOGETHER = "together"
    ONE_BY_ONE = "one by one"
    """The next one when the one before has done its workload, until the host runs out of memory
    or all are there. The earlier ones stay."""


class GuestClass(Part):
    """Guests that are alike; a host may have several classes of them.

    :ivar count: how many are on every host.
    :ivar stagger_s: how much later each guest of the class begins its workload than the one before.
    :ivar begin_within_s: up to how much later each guest begins its workload besides: a random
        time, which is the same under every arm of a repetition.
    :ivar image: the variant of the guest image; empty for the one with Python and little else.
    :ivar workload: None: that of the spec.
    """

    count: PerHost
    memory_bytes: Size = Field(alias="memory")
    stagger_s: DurationS = Field(default=0.0, alias="stagger")
    begin_within_s: DurationS = Field(default=0.0, alias="begin_within")
    image: Name = ""
    workload: Workload | None = None

    @property
    def begins_apart(self) -> bool:
        """Whether the guests of this class begin their workload at different times."""
        return bool(self.stagger_s or self.begin_within_s)


class Guests(Part):
    """The guests of every host, if all are alike; fields without a text are as in `GuestClass`.

    :ivar per_host: how many; with `start: one by one` the most that run at once. `vary` replaces
        it.
    :ivar start: whether all guests of a host are started together, or one by one.
    """

    LATER = frozenset({"start", "stagger_s", "begin_within_s", "image"})

    per_host: PerHost
    memory_bytes: Size = Field(alias="memory")
    start: Annotated[Start, Field(strict=False)] = Start.TOGETHER
    stagger_s: DurationS = Field(default=0.0, alias="stagger")
    begin_within_s: DurationS = Field(default=0.0, alias="begin_within")
    image: Name = ""

    @model_validator(mode="after")
    def _one_kind_of_start(self) -> Guests:
        if self.start is Start.ONE_BY_ONE and (self.stagger_s or self.begin_within_s):
            key = "stagger" if self.stagger_s else "begin_within"
            raise invalid_value(f"guests that start one by one do not take {key}", f"remove {key}")
        return self


class Vary(Part):
    """Numbers of guests, with each of which every arm runs.

    :ivar per_host: in place of `Guests.per_host`.
    """

    per_host: Annotated[Values[PerHost], Field(min_length=1)]


MAPPING, LIST = "(mapping)", "(list)"
"""Which form of `guests` an error of pydantic is about: a step in the error's path."""


def _form(value: Any) -> str:
    return LIST if isinstance(value, tuple | list) else MAPPING


GuestsOrClasses = Annotated[
    Annotated[Guests, Tag(MAPPING)]
    | Annotated[tuple[GuestClass, ...], Field(min_length=1, max_length=100), Tag(LIST)],
    Discriminator(_form),
]


def classes_of(
    guests: Guests | tuple[GuestClass, ...], per_host: int | None = None
) -> tuple[GuestClass, ...]:
    """Return the classes of the guests of a host.

    :param per_host: replaces the number of guests, if all are alike.
    """
    if not isinstance(guests, Guests):
        return guests
    return (
        GuestClass.model_construct(
            count=per_host or guests.per_host,
            memory_bytes=guests.memory_bytes,
            stagger_s=guests.stagger_s,
            begin_within_s=guests.begin_within_s,
            image=guests.image,
        ),
    )

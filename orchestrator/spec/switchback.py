"""A switchback: hinting is turned off and on, block by block, in guests that are there already. A
part of the model (model.py)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from hintfleet.units import parse_duration_s
from orchestrator.spec.values import Part, PositiveDurationS, invalid_value

ALL = "all"
DEFAULT_CUT_SHARE = 1 / 3
LONGEST_BLOCK_S = parse_duration_s("24h")


def _names(value: Any) -> tuple[str, ...]:
    if value == ALL:
        return ()
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise invalid_value(
            f"{value!r} is not a list of guests",
            "write the names that `hintfleet guests` shows, for example [vm1, vm2], or all",
        )
    if not value or len(set(value)) < len(value):
        raise invalid_value("name each guest once, and at least one", "all stands for all attached")
    return value


class Switchback(Part):
    """Guests that are there already, and the blocks in which their hinting is off or on.

    :ivar guests: their names; empty for all attached guests of every host.
    :ivar shortest_s, longest_s: how long a block lasts at least and at most, with its cut. A time
        between them is drawn for each repetition, for both of its blocks.
    :ivar cut_s: how much of the beginning of each block does not count, because the block before
        has left its traces; None for a third of the shortest block.
    """

    guests: Annotated[tuple[str, ...], BeforeValidator(_names), Field(max_length=1000)]
    shortest_s: PositiveDurationS = Field(alias="shortest")
    longest_s: PositiveDurationS = Field(alias="longest", le=LONGEST_BLOCK_S)
    cut_s: PositiveDurationS | None = Field(default=None, alias="cut")

    @model_validator(mode="after")
    def _lengths_fit(self) -> Switchback:
        if self.shortest_s > self.longest_s:
            raise invalid_value("the shortest block is longer than the longest")
        if self.carry_over_s >= self.shortest_s:
            raise invalid_value(
                f"nothing is left of a block of {self.shortest_s:g} s after a cut of "
                f"{self.carry_over_s:g} s",
                "give shortest more, or cut less",
            )
        return self

    @property
    def carry_over_s(self) -> float:
        """How much of the beginning of each block does not count."""
        return self.shortest_s * DEFAULT_CUT_SHARE if self.cut_s is None else self.cut_s

    @property
    def summary(self) -> str:
        """Its guests and blocks as text, of one host: `2 guests that are there, blocks of 5 to
        15 min`."""
        count = len(self.guests)
        who = f"{count} guest{'s' * (count > 1)} that are there" if count else "all attached guests"
        unit_s, unit = (60, "min") if self.shortest_s >= 60 else (1, "s")
        return (
            f"{who}, blocks of {self.shortest_s / unit_s:g} to {self.longest_s / unit_s:g} {unit}"
        )

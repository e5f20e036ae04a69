"""The workload of an experiment, as a spec describes it: phases."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hintfleet.settings import MOST_LOOP_MS, MOST_PROGRAM_MS
from orchestrator.spec.values import (
    Amount,
    AmountOrPercent,
    Command,
    Compressible,
    DurationS,
    FileName,
    FragmentSize,
    Part,
    PositiveDurationS,
    invalid_value,
    key_of,
)


class Kind(StrEnum):
    """What a step does; also the key of its phase in a spec."""

    ALLOCATE = "allocate"
    FREE = "free"
    CHURN = "churn"
    FAULT = "fault"
    BANDWIDTH = "bandwidth"
    READ = "read"
    DROP_CACHES = "drop_caches"
    COMMAND = "command"
    REPLAY = "replay"

    @property
    def needs_kernel(self) -> bool:
        """Whether the step needs a guest with a kernel of its own: not an embedded one."""
        return self in (Kind.READ, Kind.DROP_CACHES, Kind.COMMAND)

    @property
    def most_s(self) -> float:
        """The largest value of `for`, if `for` is how long the step lasts or may take; 0 if it is
        how long to hold after the step."""
        if self is Kind.COMMAND:
            return MOST_PROGRAM_MS / 1000
        return MOST_LOOP_MS / 1000 if self.is_loop else 0.0

    @property
    def is_loop(self) -> bool:
        """Whether the step works for a given time in memory that is its own."""
        return self in (Kind.CHURN, Kind.FAULT, Kind.BANDWIDTH)


class Phase(Part):
    """One step of a workload, and the time to hold after it; or a repeat.

    Exactly one key of `Kind` is set, or `repeat` (how often all phases before this one run in
    total). The value of `free` is a size, or a percentage of the memory that the workload holds;
    that of `drop_caches` is true; that of `command` is a program with its arguments; that of
    `replay` is a recording; that of the others is a size, or a percentage of the guest's memory.

    :ivar hold_s: how long to hold after the step; how long a loop lasts; how long a command may
        take.
    :ivar fragment_bytes: allocate: the size of the pieces in which memory is allocated and freed.
    :ivar compressible_percent: allocate: the part of each page that is zeros. The rest cannot be
        compressed; that is all of it if None.
    :ivar speed: replay: how many seconds of the recording pass in a second; 1 if None.
    :ivar pause_s: churn: how long to wait between two cycles.
    """

    LATER = frozenset(
        {
            *("churn", "fault", "bandwidth", "pause_s", "fragment_bytes"),
            *("read", "drop_caches", "command", "replay", "speed", "compressible_percent"),
        }
    )

    allocate: AmountOrPercent | None = None
    free: AmountOrPercent | None = None
    churn: AmountOrPercent | None = None
    fault: AmountOrPercent | None = None
    bandwidth: AmountOrPercent | None = None
    read: AmountOrPercent | None = None
    drop_caches: Literal[True] | None = None
    command: Command | None = None
    replay: FileName | None = None
    speed: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    fragment_bytes: FragmentSize | None = Field(default=None, alias="fragments")
    compressible_percent: Compressible | None = Field(default=None, alias="compressible")
    repeat: int | None = Field(default=None, ge=1, le=10000)
    hold_s: DurationS = Field(default=0.0, alias="for")
    pause_s: PositiveDurationS | None = Field(default=None, alias="pause")
    settle: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Phase:
        keys = (*Kind, "repeat")
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) != 1:
            raise invalid_value(
                f"a phase must have exactly one of {', '.join(keys[:-1])} and {keys[-1]}, not "
                f"{' and '.join(given) or 'none'}",
                "start another phase with '-'",
            )
        if self.repeat is not None and (self.hold_s or self.settle):
            raise invalid_value(
                "repeat allows neither for nor settle", "move them to another phase"
            )
        for name, kind in _KEYS_OF.items():
            if getattr(self, name) is not None and getattr(self, kind) is None:
                key = key_of(Phase, name)
                raise invalid_value(f"only {kind} takes {key}", f"remove {key}")
        most_s = 0.0 if self.repeat is not None else self.kind.most_s
        if most_s and not 0 < self.hold_s <= most_s:
            raise invalid_value(
                f"{self.kind} needs a time of at most {most_s / 60:g} minutes",
                "write how long it lasts, for example for: 10s",
            )
        return self

    @property
    def kind(self) -> Kind:
        """What its step does.

        :raises StopIteration: the phase is a repeat.
        """
        return next(kind for kind in Kind if getattr(self, kind) is not None)

    @property
    def amount(self) -> Amount | None:
        """How much memory its step is about; None if that is not given."""
        value = getattr(self, self.kind)
        return value if isinstance(value, Amount) else None


_KEYS_OF = {
    "fragment_bytes": Kind.ALLOCATE,
    "compressible_percent": Kind.ALLOCATE,
    "pause_s": Kind.CHURN,
    "speed": Kind.REPLAY,
}
"""Keys that only one kind of phase has."""


class Workload(Part):
    """The phases that each guest with this workload goes through, in order."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1, max_length=1000)]

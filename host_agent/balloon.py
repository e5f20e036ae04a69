"""The balloon as a peer of hinting: how a guest's memory target follows it, pure.

One rule, after oVirt's MOM (doc: momd balloon.rules): the guest keeps what it uses and
a reserve. The target falls in bounded steps, because a guest may be about to use what
it has; it rises at once, because a guest that needs memory needs it now. A change
within the dead band is not worth the guest's work.

What the guest uses is its balloon's size less what it says is free (MemFree): a cache
counts as used, as it does for hinting and reporting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2

PERIOD_S = 1.0
"""How often the target is looked at, and how often the guest's balloon driver speaks."""

_DEFAULT_RESERVE_PERCENT = 10
_DEFAULT_STEP_PERCENT = 5
_DEAD_BAND_PER_MILLE = 5
_SMALLEST_TARGET_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class BalloonStats:
    """What the hypervisor and the guest's balloon driver say.

    :ivar size_bytes: what the guest has now: its memory less what is in the balloon.
    :ivar unused_bytes: free in the guest, as it last said.
    :ivar said_at_s: when it said so; host wall clock, whole seconds, rounded down.
    """

    size_bytes: int
    unused_bytes: int
    said_at_s: int


class Balloon(Protocol):
    """A running guest's balloon. Both may block; called from worker threads."""

    def stats(self) -> BalloonStats | None:
        """What is known now; None before the guest's driver has spoken.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to have so much, in whole KiB; returns before it has.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One guest's settings, in bytes."""

    memory_bytes: int
    reserve_bytes: int
    step_bytes: int

    @classmethod
    def of(cls, spec: host_pb2.GuestSpec) -> Rule:
        """The rule that a spec asks for."""
        settings = spec.balloon
        percent = spec.memory_bytes // 100
        return cls(
            memory_bytes=spec.memory_bytes,
            reserve_bytes=percent * (settings.reserve_percent or _DEFAULT_RESERVE_PERCENT),
            step_bytes=percent * (settings.step_percent or _DEFAULT_STEP_PERCENT),
        )

    def next_target(self, stats: BalloonStats) -> int | None:
        """The size in bytes that the guest should have; None to leave it as it is."""
        used_bytes = stats.size_bytes - stats.unused_bytes
        wanted_bytes = max(used_bytes + self.reserve_bytes, _SMALLEST_TARGET_BYTES)
        wanted_bytes = max(wanted_bytes, stats.size_bytes - self.step_bytes)
        wanted_bytes = min(wanted_bytes, self.memory_bytes) // KIB * KIB
        dead_band_bytes = self.memory_bytes * _DEAD_BAND_PER_MILLE // 1000
        if abs(wanted_bytes - stats.size_bytes) <= dead_band_bytes:
            return None
        return wanted_bytes

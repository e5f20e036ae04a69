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

from hintfleet.settings import DEFAULT_RESERVE_PERCENT, DEFAULT_STEP_PERCENT
from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2

PERIOD_S = 1.0
"""How often the target is looked at, but at rest, and how often the guest's driver speaks."""

_PERIODS_BEFORE_REST, _PERIODS_AT_REST = 12, 4

SILENT_AFTER_S = 20.0
"""Twenty periods: even a guest under TCG on a busy host speaks in so long."""

_DEAD_BAND_PER_MILLE = 5
_SMALLEST_TARGET_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class BalloonStats:
    """What the hypervisor and the guest's balloon driver say.

    :ivar size_bytes: what the guest has now: its memory less what is in the balloon.
    :ivar unused_bytes: free in the guest, as it last said; None if it does not say.
    :ivar said_at_s: when it last said anything; host wall clock, whole seconds, rounded down;
        0 if it never did.
    """

    size_bytes: int
    unused_bytes: int | None
    said_at_s: int


class Balloon(Protocol):
    """A running guest's balloon. Both may block; called from worker threads."""

    def stats(self) -> BalloonStats:
        """What is known now.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to have so much, in whole KiB; returns before it has.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """


class Reporting(Protocol):
    """A running guest's free page reporting. May block; called from worker threads."""

    def problem(self) -> str:
        """Why the guest does not report; empty if it does, or if that cannot be known.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """


class Rest:
    """When the hypervisor need not be asked: each time takes a round trip through libvirt."""

    def __init__(self) -> None:
        self._still_periods = 0

    def over(self, stirred: bool) -> bool:
        """Whether to ask in this period.

        :param stirred: whether the guest's resident memory has moved since the last one.
        """
        self._still_periods = 0 if stirred else self._still_periods + 1
        if self._still_periods < _PERIODS_BEFORE_REST:
            return True
        return not self._still_periods % _PERIODS_AT_REST


class Silence:
    """How long a guest's balloon driver has said nothing that the rule can use."""

    def __init__(self, now_s: float) -> None:
        """:param now_s: as of every look, by a monotonic clock."""
        self._since_s = now_s
        self._said_at_s = 0

    def look(self, stats: BalloonStats, now_s: float) -> str:
        """Why the guest cannot be followed; empty while it can, or may only be slow."""
        if stats.said_at_s != self._said_at_s and stats.unused_bytes is not None:
            self._since_s, self._said_at_s = now_s, stats.said_at_s
        if now_s - self._since_s < SILENT_AFTER_S:
            return ""
        if not stats.said_at_s:
            return f"its balloon driver has said nothing in {SILENT_AFTER_S:.0f} s; is there one?"
        if stats.unused_bytes is None:
            return "its balloon driver does not say how much memory is unused"
        return f"its balloon driver has said nothing more for {SILENT_AFTER_S:.0f} s"


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
            reserve_bytes=percent * (settings.reserve_percent or DEFAULT_RESERVE_PERCENT),
            step_bytes=percent * (settings.step_percent or DEFAULT_STEP_PERCENT),
        )

    def next_target(self, stats: BalloonStats) -> int | None:
        """The size in bytes that the guest should have; None to leave it as it is."""
        if stats.unused_bytes is None:
            return None
        used_bytes = stats.size_bytes - stats.unused_bytes
        wanted_bytes = max(used_bytes + self.reserve_bytes, _SMALLEST_TARGET_BYTES)
        wanted_bytes = max(wanted_bytes, stats.size_bytes - self.step_bytes)
        wanted_bytes = min(wanted_bytes, self.memory_bytes) // KIB * KIB
        dead_band_bytes = self.memory_bytes * _DEAD_BAND_PER_MILLE // 1000
        if abs(wanted_bytes - stats.size_bytes) <= dead_band_bytes:
            return None
        return wanted_bytes

"""The balloon as a peer of hinting: the rule for a guest's memory target, when to read statistics,
and when a balloon driver is silent. Pure. Also the interfaces of balloon and free page reporting.

The rule, after oVirt's MOM (its doc/balloon.rules): the guest keeps what it uses and a reserve.
The target falls in bounded steps, because a guest may be about to use what it has. It rises at
once, because a guest that needs memory needs it now. A change within the dead band (half a percent
of the memory) is not made: it is not worth the guest's work.

What a guest uses is its memory outside the balloon less its free memory (MemFree). The page cache
counts as used, as it does under hinting and reporting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hintfleet.settings import DEFAULT_RESERVE_PERCENT, DEFAULT_STEP_PERCENT
from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2

# Once per period the guest's balloon driver sends statistics, and the host agent reads them (less
# often at rest).
PERIOD_S = 1.0

# After 12 periods without a move of resident memory, statistics are read in every fourth period
# only: reading them took half of the processor time that three resting guests with balloons cost.
_PERIODS_BEFORE_REST, _PERIODS_AT_REST = 12, 4

# Twenty periods: even a guest under TCG on a busy host sends statistics within this time.
SILENT_AFTER_S = 20.0

_DEAD_BAND_PER_MILLE = 5
_SMALLEST_TARGET_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class BalloonStats:
    """Statistics of the hypervisor and of the guest's balloon driver.

    :ivar size_bytes: what the guest has now: its memory less what is in the balloon.
    :ivar unused_bytes: free memory in the guest at `last_update_s`; None if its driver does not
        report it.
    :ivar last_update_s: when the driver last sent statistics: host wall clock, whole seconds,
        rounded down; 0 if never.
    """

    size_bytes: int
    unused_bytes: int | None
    last_update_s: int


class Balloon(Protocol):
    """A running guest's balloon. Methods may block; they are called from worker threads."""

    def stats(self) -> BalloonStats:
        """Return the latest statistics; do not wait for new ones.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        :raises hintfleet.errors.Refused: the hypervisor failed.
        """

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to take or give memory until it has this size, a multiple of 1 KiB.
        Return without waiting for that.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        :raises hintfleet.errors.Refused: the hypervisor failed.
        """


class Reporting(Protocol):
    """A running guest's free page reporting. `problem` may block; call it from a worker thread."""

    def problem(self) -> str:
        """Return why the guest does not report free pages; empty if it does, or if that cannot be
        found out.

        :raises hintfleet.errors.GuestLost: the guest is gone.
        """


class PollSchedule:
    """Decides in which periods to read the statistics: in fewer while the guest rests, because each
    read is a round trip through libvirt."""

    def __init__(self) -> None:
        self._still_periods = 0

    def is_due(self, moved: bool) -> bool:
        """Return whether to read the statistics in this period. Call it once per period: it counts
        the periods.

        :param moved: whether the guest's resident memory has moved: `GuestMemory.has_moved`.
        """
        self._still_periods = 0 if moved else self._still_periods + 1
        if self._still_periods < _PERIODS_BEFORE_REST:
            return True
        return not self._still_periods % _PERIODS_AT_REST


class Silence:
    """Measures how long ago a guest's balloon driver sent statistics that the rule can use."""

    def __init__(self, now_s: float) -> None:
        """:param now_s: present time, on the same monotonic clock as in `problem`."""
        self._since_s = now_s
        self._last_update_s = 0

    def problem(self, stats: BalloonStats, now_s: float) -> str:
        """Note these statistics, and return why the rule cannot work. Return an empty text until
        SILENT_AFTER_S have passed without new usable statistics: the guest may only be slow."""
        # Compared by !=, not by >: after the host's wall clock was set back, new statistics have
        # an earlier time.
        if stats.last_update_s != self._last_update_s and stats.unused_bytes is not None:
            self._since_s, self._last_update_s = now_s, stats.last_update_s
        if now_s - self._since_s < SILENT_AFTER_S:
            return ""
        if not stats.last_update_s:
            return f"no balloon driver sent statistics within {SILENT_AFTER_S:.0f} s"
        if stats.unused_bytes is None:
            return "its balloon driver does not report unused memory"
        return f"its balloon driver sent no more statistics for {SILENT_AFTER_S:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The rule for the balloon's target, with the settings of one guest."""

    memory_bytes: int
    reserve_bytes: int
    step_bytes: int

    @classmethod
    def of(cls, spec: host_pb2.GuestSpec) -> Rule:
        """Return the rule for a guest's spec."""
        settings = spec.balloon
        percent = spec.memory_bytes // 100
        return cls(
            memory_bytes=spec.memory_bytes,
            reserve_bytes=percent * (settings.reserve_percent or DEFAULT_RESERVE_PERCENT),
            step_bytes=percent * (settings.step_percent or DEFAULT_STEP_PERCENT),
        )

    def next_target(self, stats: BalloonStats) -> int | None:
        """Return the new target of the guest, in bytes; None to leave the target as it is."""
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

"""What an agent tells its host about its guest and itself, and when it is worth a message.

Each message costs CPU time, of which the agent of an idle guest must use almost none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from guest_agent.holding_back import HoldingBack
from guest_agent.isolation.isolator import Isolator
from guest_agent.procfs import own_rss_bytes
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

TELEMETRY_PERIOD_S = 1.0
_LONGEST_PERIOD_S = 10.0
_LEAST_CHANGE_BYTES = 1 << 20
_MOST_MS = (1 << 32) - 1

MemoryUseOf = Callable[[int], pb.MemoryUse | None]
"""Takes how many pages are isolated, and returns what all memory is used for; None if that is not
known."""


class TelemetryPace:
    """Makes telemetry at most once per second, and only if one of these holds: since it last made
    some, free memory or what is held back has changed by 1 MiB or more, the host has acknowledged
    1 MiB or more, or 10 s have passed."""

    def __init__(
        self,
        free_bytes: Callable[[], int],
        memory_use: MemoryUseOf,
        isolator: Isolator,
        holding_back: HoldingBack,
    ) -> None:
        """:param free_bytes: must be cheap: called up to once a second.
        :param memory_use: called only when telemetry is made.
        """
        self._free_bytes = free_bytes
        self._memory_use = memory_use
        self._isolator = isolator
        self._holding_back = holding_back
        self._made = pb.Telemetry()
        self._acknowledged_pages = 0
        """How much was acknowledged when `_made` was made."""
        self.begin()

    def begin(self) -> None:
        """Make the next telemetry due at once: a host agent that has begun a session may know
        nothing of this guest."""
        self._made_at_s, self._checked_at_s = -_LONGEST_PERIOD_S, -TELEMETRY_PERIOD_S

    def if_due(self, now_s: float, acknowledged_pages: int) -> pb.Telemetry | None:
        """Return telemetry if it is due, else None.

        :param acknowledged_pages: how much the host has acknowledged, in all sessions.
        """
        if now_s - self._checked_at_s < TELEMETRY_PERIOD_S:
            return None
        self._checked_at_s = now_s
        free_bytes = self._free_bytes()
        # What HoldingBack would hold back for refaults may be more than is free.
        held_pages = self._holding_back.held_back_pages(now_s)
        held_back_bytes = min(held_pages * PAGE_BYTES, free_bytes)
        changed_bytes = max(
            abs(free_bytes - self._made.free_bytes),
            abs(held_back_bytes - self._made.held_back_bytes),
            (acknowledged_pages - self._acknowledged_pages) * PAGE_BYTES,
        )
        if changed_bytes < _LEAST_CHANGE_BYTES and now_s - self._made_at_s < _LONGEST_PERIOD_S:
            return None
        self._made_at_s, self._acknowledged_pages = now_s, acknowledged_pages
        self._made = pb.Telemetry(
            agent_cpu_us=time.process_time_ns() // 1000,
            agent_rss_bytes=own_rss_bytes(),
            tracker_bytes=self._isolator.tracker_bytes(),
            free_bytes=free_bytes,
            held_back_bytes=held_back_bytes,
            held_back_for_ms=self._held_back_for_ms(now_s) if held_back_bytes else 0,
            memory=self._memory_use(self._isolator.isolated_pages()),
        )
        return self._made

    def _held_back_for_ms(self, now_s: float) -> int:
        return min(math.ceil(self._holding_back.held_back_for_s(now_s) * 1000), _MOST_MS)

"""Decides when to look at a guest's RAM file for what the books cannot know. Pure: takes times.

Only a look at the file tells which memory came back (and, under a peer, which memory left). A
look costs time for each run of pages that it passes. One fstat tells how much is resident, and
from this sum follows how much a look would find. So the sum is checked often. The RAM is looked
at soon while memory moves, seldom while almost nothing moves, and never for more than a given
share of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from host_agent.waking import WAKE_S, next_wake_s

# Less than 1 MiB is almost nothing: in a guest at rest, kernel and daemons move that much.
CALM_PAGES = 256
# How long so little memory waits for a look, and which share of a processor its looks take.
CALM_PERIOD_S = 10.0
_CALM_SHARE = 1 / 2000


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often to look while memory moves.

    :ivar period_s: shortest time from one look to the next.
    :ivar share: share of one processor that looks may take in the long run.
    """

    period_s: float
    share: float


class AuditPace:
    """Decides when to check one guest's sum, and when to look at its RAM.

    :ivar next_check_s: when the next check is due, on the clock of `check`.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.next_check_s = -math.inf
        self._rest_s = pace.period_s
        self._looked_at_s = -math.inf
        self._took_s = 0.0

    def check(self, now_s: float, moved_pages: int) -> bool:
        """Return whether to look now, and set when the next check is due.

        :param moved_pages: how many pages a look would find, by the sum.
        """
        shortest_s = self._pace.period_s
        calm = moved_pages < CALM_PAGES

        self._rest_s = max(shortest_s, min(2 * self._rest_s, WAKE_S)) if calm else shortest_s
        resting = self._rest_s == WAKE_S
        self.next_check_s = next_wake_s(now_s) if resting else now_s + self._rest_s
        look = moved_pages > 0 and now_s >= self._looked_at_s + self._pause_s(calm)
        if look:
            self._looked_at_s = now_s
        return look

    def _pause_s(self, calm: bool) -> float:
        if calm:
            return max(CALM_PERIOD_S, self._took_s / _CALM_SHARE)
        return max(self._pace.period_s, self._took_s / self._pace.share)

    def looked(self, took_s: float) -> None:
        """Note how much processor time the last look took."""
        self._took_s = took_s

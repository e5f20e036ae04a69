"""Decides when to look at a guest's RAM for what the books cannot know. Pure: the caller passes
the time.

Only a look at the RAM files shows which absent pages became resident (and, under a peer, which
became absent). A look costs time for each run of pages that it passes. One fstat(2) for each file
returns how much is resident, and from this sum follows how much a look would find (under a peer,
the least that it would find). So the sum is checked often, at rest once a second. A look follows
soon while memory moves, and late while almost none moves. In the long run, looks take no more than
a given share of a processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from host_agent.waking import WAKE_S, next_wake_s

# If a look would find fewer changed pages than this (1 MiB), the guest is calm: even at rest, its
# kernel and its daemons change some.
CALM_PAGES = 256
# In a calm guest: the shortest time from one look to the next, and the largest share of a processor
# that looks may take.
CALM_PERIOD_S = 10.0
_CALM_SHARE = 1 / 2000


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often to check and to look while memory moves.

    :ivar period_s: time between two checks, and shortest time from one look to the next.
    :ivar share: largest share of one processor that looks may take in the long run.
    """

    period_s: float
    share: float


class AuditPace:
    """Decides when to check how much of one guest's RAM is resident, and when to look at its RAM.

    :ivar next_check_s: when the caller must call `check` next, by the clock of its `now_s`.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.next_check_s = -math.inf
        self._rest_s = pace.period_s
        self._looked_at_s = -math.inf
        self._took_s = 0.0

    def check(self, now_s: float, moved_pages: int) -> bool:
        """Return whether the caller must look now (the look counts as begun then), and set
        `next_check_s`.

        :param moved_pages: how many changed pages a look would find (`GuestMemory.moved_pages`).
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
        """Note how much processor time the last look took: a long one delays the next look."""
        self._took_s = took_s

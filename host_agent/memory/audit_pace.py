"""When to look at a guest's RAM file for what the books cannot know. Pure: clocks are handed in.

Only a look at the file tells which memory came back (and under the peers which left). A look
costs time for each run of pages that it passes. One fstat tells how much is resident; from
this sum follows how much a look would find. So the sum is checked often, and the RAM is looked
at soon while memory moves, seldom while next to nothing moves, and never for more than a share
of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from host_agent.waking import WAKE_S, next_wake_s

CALM_PAGES = 256
"""Less than this (1 MiB) is next to nothing: a guest that rests has kernel and daemons, too."""
CALM_PERIOD_S = 10.0
"""How long next to nothing waits to be looked for."""
_CALM_SHARE = 1 / 2000


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often to look while memory moves.

    :ivar period_s: no sooner than this after the last look.
    :ivar share: of one processor, which looks may take in the long run.
    """

    period_s: float
    share: float


class AuditPace:
    """When one guest's sum is checked next, and its RAM looked at.

    :ivar next_check_s: no sooner than then.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.next_check_s = -math.inf
        self._rest_s = pace.period_s
        self._looked_at_s = -math.inf
        self._took_s = 0.0

    def check(self, now_s: float, moved_pages: int) -> bool:
        """Whether to look now.

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
        """A look has ended that took so much processor time."""
        self._took_s = took_s

"""How much free memory a guest holds back, so that it need not take it back from the host
(policies adaptive and cold).

Hinting a chunk that its guest soon uses again costs a refault and saves nothing; holding back a
chunk that is not used again keeps the host's memory for nothing. `HoldingBack` decides which it is
likely to be. Under policy adaptive it learns that from the guest's own use; under policy cold it
holds each chunk back for the same time. It is pure: times and amounts in, amounts out.

It works by amount. The guest's memory is a stack of levels of one chunk (larger ones in large
guests): level k is in use while the guest uses more than k chunks, whichever they are. So when a
guest frees memory, the upper levels become idle; when it takes memory back, they are in use again,
the lowest first. Each level is a problem of its own: was it right to hold it back for the time that
it was idle? (A server that is switched off when it is idle is the same problem: Lu, Chen and
Andrew, "Simple and Effective Dynamic Provisioning for Power-Proportional Data Centers", IEEE TPDS
24(6), 2013.) An isolator has only to keep as much memory as all held levels have together, and it
may choose any. Most allocators use memory that was freed lately before memory that was hinted.

The costs: a refault of one chunk costs c; holding one chunk back for a second costs p. Both are in
one number, the break-even time c / p: holding a chunk for so long costs as much as a refault. A
level that is idle for x break-even times could, in hindsight, have cost min(x, 1) refaults.
Whoever holds each level for f break-even times pays x if x < f, else f + 1. With f = 1 (ski
rental) that is never more than twice the best in hindsight; with f = 0 (eager) it is the best where
memory rests, and the worst where it is used again at once.

The rule: each level keeps a score for each f in `SHARES`: how many refaults it would have saved
against f = 1 so far, within `_MOST_SAVED` either way. An idle level is held for the f with the
highest score, if that is not below 0, and else for f = 1; of equal scores, for the smallest f. So a
level that was never used again goes at once; after one regret it is held for a tenth of the
break-even time, then for longer; after some long rests it goes at once again.

The bound: with a constant break-even time, a level costs at most B times the best in hindsight, and
`ADDED_COST` refaults more, where B is `COMPETITIVE_RATIO`. Why: f = 1 costs at most twice the best.
The rule costs more than f = 1 only where the f that it follows loses score. An f is followed only
while its score is not below 0, and loses at most one refault at a time, so it can lose what it has
gained, and one refault more. It gains only in rests of at least the break-even time, at most 1 - f
refaults in each; and each of those costs the best in hindsight one refault. (The bounds of the
score take nothing from this: the upper one only takes gains away, and no f is followed near the
lower one.) The bound is about levels; what `refaulted` adds is bounded by the refaults that it
answers: each chunk of them is held back for a break-even time at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

SHARES = (0.0, 0.1, 0.3)
"""The shares of the break-even time that are tried besides all of it."""

_MOST_SAVED = 4.0
"""Bound of a score, in refaults: how soon a level that has changed its habit is believed."""

COMPETITIVE_RATIO = 2 + sum(1 - share for share in SHARES)
ADDED_COST = len(SHARES) + 1
"""In refaults, for each level: the first regret of each share, and holding back what is never used
again."""

_MOST_LEVELS = 1 << 12

_MOST_LOOKED_AT = 512
"""Bound of the levels that `would_hold_pages` looks at: it is called for each look at the guest."""


class HoldingBack:
    """Decides how many free pages a guest holds back. Starts as policy eager: none."""

    def __init__(self, total_pages: int, chunk_pages: int) -> None:
        """:param total_pages: the memory of the guest; it may use more than that later."""
        self._level_pages = max(1, -(-total_pages // chunk_pages // _MOST_LEVELS)) * chunk_pages
        self._level_count = -(-total_pages // self._level_pages)
        self._break_even_s = 0.0
        self._learns = True
        self._levels_in_use = 0
        self._observed_s = 0.0
        """When `observe` was last called."""
        self._idle_since_s: dict[int, float] = {}
        """When each idle level that was in use before was last used."""
        self._held = {share: OrderedDict[int, float]() for share in (*SHARES, 1.0)}
        """For each share: the levels held for it, and since when; the first is the oldest."""
        self._scores: dict[int, list[float]] = {}
        self._report_delay_s = 1.0
        """How long after a refault the host is assumed to report it, at most."""
        self._entered = self._entered_before = 0
        """Levels that came into use without having been held, less those that a report of refaults
        has explained: since `_entered_since_s`, and in a time of more than `_report_delay_s` before
        that."""
        self._entered_since_s = 0.0

    def set_policy(
        self, break_even_s: float, *, learns: bool = True, report_period_s: float = 0.0
    ) -> None:
        """Follow another policy from now on; what was learned is kept.

        :param break_even_s: for how long a chunk is held back at most; 0 holds nothing back.
        :param learns: False holds back each chunk for `break_even_s` (policy cold).
        :param report_period_s: how often the host reports refaults.
        """
        self._report_delay_s = max(1.0, 2 * report_period_s)
        self._break_even_s = break_even_s
        self._learns = learns

    def observe(self, now_s: float, used_pages: int, peak_pages: int = 0) -> None:
        """Note how many pages are in use.

        :param peak_pages: the most that were in use since the last call, where that is known.
        """
        self._end_holds(now_s)
        peak = -(-max(used_pages, peak_pages) // self._level_pages)
        used = -(-used_pages // self._level_pages)
        if now_s - self._entered_since_s > self._report_delay_s:
            self._entered_before, self._entered, self._entered_since_s = self._entered, 0, now_s
        # When levels were used that are idle again is not known: assume half way between the last
        # call and this one.
        between_s = (self._observed_s + now_s) / 2
        for level in range(self._levels_in_use, peak):
            self._entered += not self._used_again(level, now_s if level < used else between_s)
        for level in range(used, max(peak, self._levels_in_use)):
            self._fell_idle(level, now_s)
        self._levels_in_use, self._observed_s = used, now_s

    def refaulted(self, now_s: float, pages: int) -> None:
        """Note a host's report that so many pages which were absent are resident again.

        Most of them are of levels that came into use, as `observe` has seen. The others were used
        and freed between two calls of `observe`, or the guest's allocator has used absent memory
        although what is held back was free. Both need more to be held back than the levels say:
        that many levels of a second stack, below 0.
        """
        unexplained = pages // self._level_pages - self._entered_before - self._entered
        self._entered_before, self._entered = 0, max(0, -unexplained)
        for level in range(-1, -self._level_count - 1, -1):
            if unexplained <= 0 or not self._learns:
                return
            if not any(level in held for held in self._held.values()):
                self._used_again(level, now_s)
                self._fell_idle(level, now_s)
                unexplained -= 1

    def held_back_pages(self, now_s: float) -> int:
        """Return how many free pages should not be hinted now; may be more than are free."""
        self._end_holds(now_s)
        return sum(map(len, self._held.values())) * self._level_pages

    def held_back_for_s(self, now_s: float) -> float:
        """Return after how many seconds the last of what is held back now is let go at the latest;
        0.0 if nothing is. Memory that is freed until then may be held back for longer."""
        self._end_holds(now_s)
        # Each queue begins with its oldest hold, so its newest one ends last.
        ends_s = (
            next(reversed(held.values())) + share * self._break_even_s
            for share, held in self._held.items()
            if held
        )
        return max(ends_s, default=now_s) - now_s

    def would_hold_pages(self) -> int:
        """Return a lower bound of how many pages in use would be held back if they were freed now.

        Count levels from the highest one in use downwards, up to the first that would not be held
        back, and no more than `_MOST_LOOKED_AT`.
        """
        first = max(0, self._levels_in_use - _MOST_LOOKED_AT)
        level = self._levels_in_use
        while level > first and self._share_of(level - 1):
            level -= 1
        return (self._levels_in_use - level) * self._level_pages

    def _end_holds(self, now_s: float) -> None:
        for share, held in self._held.items():
            until_s = now_s - share * self._break_even_s
            while held and next(iter(held.values())) <= until_s:
                held.popitem(last=False)

    def _used_again(self, level: int, now_s: float) -> bool:
        """End the rest of a level, and learn from the rest; return whether the level was held until
        now."""
        since_s = self._idle_since_s.pop(level, None)
        if since_s is not None and self._learns and self._break_even_s:
            self._learn(level, (now_s - since_s) / self._break_even_s)
        return any(held.pop(level, None) is not None for held in self._held.values())

    def _fell_idle(self, level: int, now_s: float) -> None:
        for held in self._held.values():
            held.pop(level, None)
        self._idle_since_s[level] = now_s
        if share := self._share_of(level):
            self._held[share][level] = now_s

    def _share_of(self, level: int) -> float:
        """Return for which share of the break-even time this level is held back when it is idle."""
        if not self._break_even_s:
            return 0.0
        if not self._learns:
            return 1.0
        scores = self._scores.get(level)
        if scores is None:
            return 0.0
        best = max(scores)
        return SHARES[scores.index(best)] if best >= 0 else 1.0

    def _learn(self, level: int, rest: float) -> None:
        """:param rest: how long the level was idle, in break-even times."""
        scores = self._scores.setdefault(level, [0.0] * len(SHARES))
        for n, share in enumerate(SHARES):
            saved = scores[n] + cost(rest, 1.0) - cost(rest, share)
            scores[n] = min(max(saved, -_MOST_SAVED), _MOST_SAVED)


def cost(rest: float, share: float) -> float:
    """Return what holding a level back for `share` costs if it is idle for `rest`, then used again.

    Both are in break-even times, the cost is in refaults.
    """
    # A level that is used at the very moment at which it is let go is a refault. Such a rest is a
    # share only within rounding errors.
    return rest if rest < share * (1 - 1e-9) else share + 1


def best_cost(rests: Iterable[float]) -> float:
    """Return the least cost of these rests, in refaults, had each been known in advance."""
    return sum(min(rest, 1.0) for rest in rests)

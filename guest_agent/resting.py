"""How often an agent looks for free chunks: less often in a guest at rest.

An idle agent uses CPU time mostly to wake up.
"""

from __future__ import annotations

from guest_agent.isolation.isolator import UsedPages

_POLLS_BEFORE_REST = 10
# The least pause between two polls after 0, 10 and 20 idle polls in a row (a rest). The kernel's
# own reporting waits 2 s, too (mm/page_reporting.c: PAGE_REPORTING_DELAY). A rest delays few hints:
# hinted memory is used before it is freed again, and the host's report of that use (Refaulted) ends
# the rest.
_RESTING_PERIODS_S = (0.0, 1.0, 2.0)
# The longest pause of a rest in a guest that uses and frees memory, but hints almost none, because
# it is held back. The use of the memory must be seen, but each poll takes time from the guest
# (under TCG, ten polls a second took 5 to 10 %).
_LONGEST_BUSY_PERIOD_S = 0.3
# A poll is idle if fewer pages than this (8 MiB) refault or are hinted before the next poll. So few
# do not end a rest: even in an idle guest, kernel and daemons split and merge a chunk now and then.
_LEAST_ACTIVE_PAGES = 2048


class Resting:
    """Counts the polls in a row after which few pages were hinted or refaulted."""

    def __init__(self) -> None:
        self._idle_polls = 0
        """Idle polls in a row."""
        self._active_pages = 0
        """Pages that refaulted or were hinted since the last poll."""
        self._now_pages = self._lowest_pages = self._highest_pages = 0
        """Pages in use: as last seen, and the fewest and the most since the last poll."""
        self._busy = False
        """Whether the fewest and the most pages in use between the last two polls were at least
        `_LEAST_ACTIVE_PAGES` apart."""

    @property
    def period_s(self) -> float:
        """The least pause between two polls; 0 if the guest is not at rest."""
        tens = self._idle_polls // _POLLS_BEFORE_REST
        period_s = _RESTING_PERIODS_S[min(tens, len(_RESTING_PERIODS_S) - 1)]
        return min(period_s, _LONGEST_BUSY_PERIOD_S) if self._busy else period_s

    def end(self) -> None:
        """End the rest."""
        self._idle_polls = 0

    def moved(self, pages: int) -> None:
        """Note that so many pages refaulted or were hinted; many end the rest."""
        self._active_pages += pages
        if self._active_pages >= _LEAST_ACTIVE_PAGES:
            self.end()

    def used(self, used: UsedPages) -> None:
        """Note how many pages are in use."""
        self._lowest_pages = min(self._lowest_pages, used.now)
        self._highest_pages = max(self._highest_pages, used.peak)
        self._now_pages = used.now

    def polled(self) -> None:
        """Note that a poll has ended."""
        self._idle_polls += 1
        self._active_pages = 0
        self._busy = self._highest_pages - self._lowest_pages >= _LEAST_ACTIVE_PAGES
        self._lowest_pages = self._highest_pages = self._now_pages

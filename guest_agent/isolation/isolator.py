"""The interface of isolators: take free chunks out of the guest's allocator, and give them back.

`embedded` and `hugetlb` look for free chunks when the core asks; `kmod` returns those that the
kernel's page reporting has isolated already. All three have the same interface, and the core asks
each of them at the same moments: for example when it is woken, when its period has passed, and
after each ack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from hintfleet.ranges import RangeSet
from hintfleet.settings import IsolatorKind


class UsedPages(NamedTuple):
    """How much of a guest's memory is in use: neither free nor isolated.

    :ivar peak: the most since the last look; `now` where only that is known.
    """

    now: int
    peak: int


class HeldPages(NamedTuple):
    """How much to hold back.

    :ivar free: so many free pages that are resident on the host should be left unhinted.
    :ivar in_use: so many pages more, if those that are in use now are freed.
    """

    free: int
    in_use: int


HeldBack = Callable[[UsedPages | None], HeldPages]
"""Takes what is in use (None if that cannot be known now), and returns how much to hold back."""


def nothing_held_back(_used: UsedPages | None) -> HeldPages:
    """Return that nothing is held back: all free memory may be hinted."""
    return HeldPages(0, 0)


class Isolator(Protocol):
    """Takes free chunks out of the guest's allocator and gives them back.

    The session calls all methods from one thread.
    """

    name: IsolatorKind

    must_be_polled: bool
    """Whether chunks can become free without a wake. If so, `idle` is called once per period, and
    less often in a guest at rest."""

    @property
    def unfinished(self) -> bool:
        """Whether the last `isolate` returned only part of a batch that is released as a whole.

        The core must then isolate the rest, too, even beyond its allowance.
        """

    def start(self, wake: Callable[[], None], held_back: HeldBack = nothing_held_back) -> RangeSet:
        """Begin, and return the ranges that an earlier agent left isolated (may be empty).

        :param wake: called when there may be chunks to isolate, from any thread; hugetlb never
            calls it.
        :param held_back: called with what `used_pages` returns, to learn how much to hold back,
            when `idle`, `isolate` or `enough_ready` depend on that.
        :raises hintfleet.errors.Refused: isolation is not safe or not possible here. The message
            says why and, if known, what to do. This call has isolated no chunk.
        :raises hintfleet.errors.TransientError: somebody else has just begun to use what isolation
            needs (hugetlb).
        """

    def used_pages(self) -> UsedPages | None:
        """Return how many pages of the guest are in use, now and at most since the last call; None
        if that cannot be known now (kmod, while the kernel isolates chunks)."""

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        """Isolate free chunks within both bounds, and leave what is held back. Never waits for
        chunks.

        kmod isolates whole batches. If more than a quarter of the next batch should be held back,
        it leaves all of that batch. Else it isolates all of it, and so leaves up to a quarter of
        a batch less than what is held back.

        Return an empty set if no chunk is ready. Returned ranges stay isolated at least until
        `release`.
        """

    def enough_ready(self) -> bool:
        """Whether so many chunks are ready that they should be hinted before the period ends."""

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """Release `ranges`, exactly one set that `isolate` or `start` has returned.

        The chunks are given back to the guest: by kmod only when their whole batch is released,
        by hugetlb only when their pass has ended.

        :param hinted: False if the ranges must be isolated and hinted again: the host did not act
            on them, or its ack was lost.
        """

    def report_now(self, *, thorough: bool) -> None:
        """Begin at once to make free chunks ready for `isolate`. Never blocks.

        :param thorough: make all free chunks ready, even if few are new, and whatever that costs
            the guest.
        """

    def refaulted(self, ranges: RangeSet) -> None:
        """Note ranges that do not count as absent any more (Refaulted): the host has found them
        resident, or they were unplugged.

        If such a range is free, hinting it gives the host memory. The first call of a session has
        all resident ranges.
        """

    def idle(self) -> bool:
        """Return whether no chunk is ready or being made ready, except those that are held back;
        hugetlb also returns True while a batch is in flight.

        If hugetlb holds chunks of a pass and none of them is in flight, this call ends the pass
        and gives all its chunks back, even those that `isolate` has not returned: the core may
        have used up its allowance, may have lost the host, or may be about to end.
        """

    def isolated_pages(self) -> int:
        """Return how many pages are isolated and not given back to the guest's allocator yet, with
        those that an earlier agent left and those that `isolate` has not returned."""

    def tracker_bytes(self) -> int:
        """Return the size of the tracker's own data; 0 where the kernel tracks."""

    def close(self) -> None:
        """Close all files. Isolated chunks stay isolated, for the next agent (I4)."""

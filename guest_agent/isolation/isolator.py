"""Taking free chunks out of the guest's allocator, so that nobody can use them.

One interface serves isolators that the agent pulls from (`embedded`, `hugetlb`) and one
that the kernel pushes through (`kmod`): the hinting core asks for chunks
whenever it was woken or its period has passed, and does not know which it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hintfleet.ranges import RangeSet
from hintfleet.settings import IsolatorKind


class Isolator(Protocol):
    """Takes free chunks out of use and gives them back.

    All methods but `start`'s callback are called from one thread.
    """

    name: IsolatorKind

    must_be_polled: bool
    """Whether chunks can become free without a wake: then `idle` is asked once per period, or
    more seldom at rest."""

    @property
    def unfinished(self) -> bool:
        """Whether `isolate` gave part of what goes back only as a whole: the rest is to be
        taken, too, even if that is more than is allowed."""

    def start(self, wake: Callable[[], None]) -> RangeSet:
        """Begin, and return what an earlier agent left isolated (may be empty).

        :param wake: called from any thread when there may be something to isolate.
        :raises hintfleet.errors.Refused: isolation is not safe or not possible
            here; says why and what to do. Nothing is isolated then.
        """

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        """Isolate free chunks, within both bounds; empty if none is ready now. Never blocks.

        What is returned stays isolated until `release`.
        """

    def enough(self) -> bool:
        """Whether so much is ready that it should be hinted now, and not in a period's time."""

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """Give back ranges exactly as `isolate` or `start` returned them.

        :param hinted: whether the host has dealt with them; if not, they will be
            isolated again, so that nothing is left behind.
        """

    def report_now(self, *, thorough: bool) -> None:
        """Make what is free ready for `isolate`, without delay. Never blocks.

        :param thorough: all of it, whatever that costs the guest and however little it gains.
        """

    def used_again(self, ranges: RangeSet) -> None:
        """The host says that these were absent and are resident now (host-guided hinting):
        hinting them gains, if they are free. What it says first is all that is resident."""

    def only_cold(self, after_s: float) -> None:
        """From now on, isolate only chunks that have been free for `after_s`; 0 for all.

        :raises hintfleet.errors.Refused: this isolator does not know since when.
        """

    def idle(self) -> bool:
        """Whether nothing is ready, nor being made ready: `isolate` has nothing to give.

        An isolator that holds chunks for a pass gives back what no `isolate` came for: the core
        may have used up its allowance, or have lost the host, or be about to end.
        """

    def tracker_bytes(self) -> int:
        """Memory that the tracker behind this isolator holds; 0 where the kernel tracks."""

    def close(self) -> None:
        """Let go. What is still isolated stays so, for the next agent (I4)."""

"""The interface of isolators: take free chunks out of the guest's allocator, and give them back.

`embedded` and `hugetlb` look for free chunks when the core asks; `kmod` is called by the
kernel. The interface is the same: the hinting core asks for chunks when it is woken or when
its period has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hintfleet.ranges import RangeSet
from hintfleet.settings import IsolatorKind


class Isolator(Protocol):
    """Takes free chunks out of use and gives them back.

    All methods are called from one thread.
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

    def start(self, wake: Callable[[], None]) -> RangeSet:
        """Begin, and return the ranges that an earlier agent left isolated (may be empty).

        :param wake: called when there may be chunks to isolate, from any thread.
        :raises hintfleet.errors.Refused: isolation is not safe or not possible
            here; says why and what to do. Nothing is isolated then.
        """

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        """Isolate free chunks within both bounds, and return them. Never blocks.

        Empty if none is ready now. Returned ranges stay isolated until `release`.
        """

    def enough_ready(self) -> bool:
        """Whether so many chunks are ready that they should be hinted before the period ends."""

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """Give back ranges exactly as `isolate` or `start` returned them.

        :param hinted: whether the host has dealt with them; if not, they will be isolated and
            hinted again.
        """

    def report_now(self, *, thorough: bool) -> None:
        """Make free chunks ready for `isolate` without delay. Never blocks.

        :param thorough: all free chunks, whatever that costs the guest, and even if few are new.
        """

    def refaulted(self, ranges: RangeSet) -> None:
        """Note ranges that were absent and are resident now, as the host says (Refaulted).

        If they are free, hinting them gains memory. The first call names all resident ranges.
        """

    def only_cold(self, after_s: float) -> None:
        """From now on, isolate only chunks that have been free for `after_s`; 0 for all.

        :raises hintfleet.errors.Refused: this isolator does not know how long a chunk has been
            free.
        """

    def idle(self) -> bool:
        """Whether no chunk is ready and none is being made ready.

        An isolator that holds chunks for a pass gives back those that `isolate` did not fetch:
        the core may have used up its allowance, have lost the host, or be about to end.
        """

    def tracker_bytes(self) -> int:
        """Memory that the tracker behind this isolator holds; 0 where the kernel tracks."""

    def close(self) -> None:
        """Close all files. Isolated chunks stay isolated, for the next agent (I4)."""

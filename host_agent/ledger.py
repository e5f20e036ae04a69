"""The books of one guest, as a pure value machine over sets of pages.

Balance, whenever the guest stands still after an `audit`:

    resident + reclaimed_now + untouched = provisioned
    hinted_total = reclaimed_total + absent_total + sum(skipped_total)

`untouched` is what was never resident: a hint there is `absent`, not a saving.

Where somebody else takes memory out of the RAM file (the hypervisor's free page
reporting, its balloon), only the file can tell: an audit then looks at all of it, and
what is gone since the last one is entered as reclaimed. Such totals are samples: what
went and came back between two audits is in none of them; the first balance holds all
the same.
"""

from __future__ import annotations

from collections import Counter

from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.reclaim import Outcome


class Ledger:
    """What was hinted, reclaimed and refaulted. Counts pages, speaks bytes."""

    def __init__(self, ram_pages: RangeSet, *, others_reclaim: bool = False) -> None:
        """Open the books of a guest whose RAM has never been touched.

        :param others_reclaim: whether memory may leave the RAM without a `post`.
        """
        self._provisioned = ram_pages.page_count
        self._others_reclaim_in = ram_pages if others_reclaim else RangeSet()
        self.untouched = ram_pages
        """Pages that were never seen resident."""
        self.reclaimed = RangeSet()
        """Pages that were reclaimed and are still absent, as of the last audit."""
        self._hinted = self._reclaimed_total = self._absent = self._refaulted = 0
        self._skipped: Counter[hinting_pb2.SkipReason.ValueType] = Counter()
        self._batches = self._wire_bytes = self._ranges = 0

    @property
    def absent_pages(self) -> RangeSet:
        """Where an audit has to look: pages that may be absent."""
        return self._others_reclaim_in or self.reclaimed | self.untouched

    def post(self, hinted: RangeSet, outcome: Outcome, wire_bytes: int) -> None:
        """Enter one batch.

        :param wire_bytes: size of its packed ranges.
        """
        self._batches += 1
        self._wire_bytes += wire_bytes
        self._ranges += len(hinted)
        self._hinted += hinted.page_count
        self._absent += outcome.absent.page_count
        for reason, ranges in outcome.skipped.items():
            self._skipped[reason] += ranges.page_count
        # Reclaimed before and reclaimed again: it was resident between, unseen.
        self._refaulted += (self.reclaimed & outcome.reclaimed).page_count
        self._reclaimed_total += outcome.reclaimed.page_count
        self.reclaimed |= outcome.reclaimed
        self.untouched -= outcome.reclaimed

    def audit(self, resident: RangeSet) -> RangeSet:
        """Take note of pages found resident; those that were absent by the books until now.

        :param resident: resident pages within `absent_pages`; others change nothing.
        """
        gone = self._others_reclaim_in - resident - self.reclaimed - self.untouched
        self._reclaimed_total += gone.page_count
        self.reclaimed |= gone
        refaulted = self.reclaimed & resident
        touched = self.untouched & resident
        self._refaulted += refaulted.page_count
        self.reclaimed -= refaulted
        self.untouched -= touched
        return refaulted | touched

    def as_pb2(self, resident_bytes: int) -> host_pb2.Ledger:
        """The books in bytes, beside what the RAM file says is resident."""
        return host_pb2.Ledger(
            provisioned_bytes=self._provisioned * PAGE_BYTES,
            resident_bytes=resident_bytes,
            hinted_total_bytes=self._hinted * PAGE_BYTES,
            reclaimed_total_bytes=self._reclaimed_total * PAGE_BYTES,
            absent_total_bytes=self._absent * PAGE_BYTES,
            skipped_total_bytes={
                hinting_pb2.SkipReason.Name(reason).lower(): pages * PAGE_BYTES
                for reason, pages in self._skipped.items()
            },
            refaulted_total_bytes=self._refaulted * PAGE_BYTES,
            reclaimed_now_bytes=(self._reclaimed_total - self._refaulted) * PAGE_BYTES,
            untouched_bytes=self.untouched.page_count * PAGE_BYTES,
            batches=self._batches,
            wire_bytes=self._wire_bytes,
            ranges=self._ranges,
        )

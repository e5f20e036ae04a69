"""The books of one guest: a pure state machine over sets of pages.

Both balances hold after an `audit` while the guest stands still:

    resident + reclaimed_now + untouched = provisioned
    hinted_total = reclaimed_total + absent_total + sum(skipped_total)

`untouched` memory was never resident: a hint of it counts as `absent`, not as a saving.

Memory that is plugged is untouched. Memory that is unplugged while it is reclaimed leaves
`reclaimed_now`, and has a total of its own, because it did not come back:

    reclaimed_now = reclaimed_total - refaulted_total - unplugged_total

Where somebody else takes memory out of the RAM file (the hypervisor's free page reporting or its
balloon), only the file can tell. Then an audit looks at all of it, and enters what has left since
the last audit as reclaimed. Such totals are samples: memory that left and came back between two
audits is in none of them. The first balance holds all the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.memory.page_map import NO_PAGES, PageMap
from host_agent.memory.reclaim import Outcome


@dataclass(frozen=True, kw_only=True)
class Books:
    """A ledger at one moment, as it is stored and restored.

    :ivar totals: its sums; `resident_bytes` is not set, because the RAM file tells it.
    :ivar ram: all page frames that are RAM.
    :ivar reclaimed, untouched: as in Ledger.
    """

    totals: host_pb2.Ledger
    ram: PageMap
    reclaimed: PageMap
    untouched: PageMap


class Ledger:
    """What was hinted, reclaimed and refaulted. It counts pages; `as_pb2` converts to bytes."""

    def __init__(self, ram_pages: PageMap, *, others_reclaim: bool = False) -> None:
        """Begin the books of a guest whose RAM was never touched.

        :param others_reclaim: whether memory may leave the RAM without a `post`.
        """
        self._ram = ram_pages
        self._others_reclaim = others_reclaim
        self.untouched = ram_pages
        """Pages that were never seen resident."""
        self.reclaimed = NO_PAGES
        """Pages that were reclaimed and are still absent, as of the last audit."""
        # The union of the two, and its size: every batch asks for them, and to compute them goes
        # through all sections of the RAM.
        self._absent_pages, self._absent_page_count = ram_pages, ram_pages.page_count
        self._hinted = self._reclaimed_total = self._absent = self._refaulted = 0
        self._unplugged = 0
        self._skipped: Counter[hinting_pb2.SkipReason.ValueType] = Counter()
        self._batches = self._wire_bytes = self._ranges = 0

    @classmethod
    def restored(cls, ram_pages: PageMap, books: Books, *, others_reclaim: bool = False) -> Ledger:
        """Return a ledger with stored books. `recover` must follow: the guest ran on meanwhile.

        :param ram_pages: what is RAM now; memory may have been plugged or unplugged meanwhile.
        """
        ledger, totals = cls(books.ram, others_reclaim=others_reclaim), books.totals
        ledger.untouched, ledger.reclaimed = books.untouched, books.reclaimed
        ledger._absent_pages = books.untouched | books.reclaimed
        ledger._absent_page_count = ledger._absent_pages.page_count
        ledger._hinted = totals.hinted_total_bytes // PAGE_BYTES
        ledger._reclaimed_total = totals.reclaimed_total_bytes // PAGE_BYTES
        ledger._absent = totals.absent_total_bytes // PAGE_BYTES
        ledger._refaulted = totals.refaulted_total_bytes // PAGE_BYTES
        ledger._unplugged = totals.unplugged_total_bytes // PAGE_BYTES
        for reason, size_bytes in totals.skipped_total_bytes.items():
            ledger._skipped[hinting_pb2.SkipReason.Value(reason.upper())] = size_bytes // PAGE_BYTES
        ledger._batches, ledger._wire_bytes = totals.batches, totals.wire_bytes
        ledger._ranges = totals.ranges
        ledger.plugged(ram_pages - books.ram)
        ledger.unplugged(books.ram - ram_pages)
        return ledger

    def recover(self, resident: PageMap) -> None:
        """Bring restored books up to date from the RAM file alone.

        A page that is absent in the file and resident by the books was reclaimed by a batch that
        the killed host agent did not save: it is entered as hinted and reclaimed. Pages that
        such a batch hinted while they were absent, or that were reclaimed and used again, are in
        no total. Both balances hold all the same.

        :param resident: all resident pages of the RAM; no batch may be running.
        """
        if not self._others_reclaim:
            gone = self._ram - resident - self._absent_pages
            self._hinted += gone.page_count
            self._gone(gone)
        self.audit(resident)

    def _gone(self, pages: PageMap) -> None:
        """Enter pages as reclaimed that were resident by the books."""
        self._reclaimed_total += pages.page_count
        self.reclaimed |= pages
        self._absent_pages |= pages
        self._absent_page_count += pages.page_count

    def _not_absent(self, pages: PageMap) -> None:
        """Remove pages from those that are absent by the books."""
        self._absent_pages -= pages
        self._absent_page_count -= pages.page_count

    def books(self) -> Books:
        """Return all that is in the books, to be stored."""
        return Books(
            totals=self.as_pb2(resident_bytes=0),
            ram=self._ram,
            reclaimed=self.reclaimed,
            untouched=self.untouched,
        )

    @property
    def absent_pages(self) -> PageMap:
        """Pages that may be absent. An audit has to look at these only."""
        return self._ram if self._others_reclaim else self._absent_pages

    def unseen_pages(self, resident_bytes: int) -> int:
        """Return how many pages are resident in the RAM file and absent by the books, by the sum.
        Negative if more pages have left the file than came back.

        Unless others reclaim, a page that is resident by the books is resident in the file. So
        this is exactly how many pages an audit will find.

        :param resident_bytes: how much of the RAM file is resident.
        """
        resident_by_books = self._ram.page_count - self._absent_page_count
        return resident_bytes // PAGE_BYTES - resident_by_books

    def plugged(self, pages: PageMap) -> None:
        """Add pages to the RAM, as untouched."""
        self._ram |= pages
        self.untouched |= pages
        self._absent_pages |= pages
        self._absent_page_count += pages.page_count

    def unplugged(self, pages: PageMap) -> PageMap:
        """Remove pages from the RAM; return those that were absent by the books."""
        reclaimed, untouched = self.reclaimed & pages, self.untouched & pages
        self._unplugged += reclaimed.page_count
        self._ram -= pages
        self.reclaimed -= reclaimed
        self.untouched -= untouched
        absent = reclaimed | untouched
        self._not_absent(absent)
        return absent

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
        # Absent by the books, yet resident when it was punched: it had come back unseen.
        self._used(self._absent_pages & outcome.reclaimed)
        self._gone(outcome.reclaimed)

    def audit(self, resident: PageMap) -> PageMap:
        """Enter pages that were found resident; return those that were absent by the books.

        :param resident: resident pages within `absent_pages`; others change nothing.
        """
        if self._others_reclaim:
            self._gone(self._ram - resident - self._absent_pages)
        return self._used(resident)

    def _used(self, pages: PageMap) -> PageMap:
        """Enter pages as in use; return those that were absent by the books."""
        refaulted, touched = self.reclaimed & pages, self.untouched & pages
        self._refaulted += refaulted.page_count
        self.reclaimed -= refaulted
        self.untouched -= touched
        used = refaulted | touched
        self._not_absent(used)
        return used

    def as_pb2(self, resident_bytes: int) -> host_pb2.Ledger:
        """Return the books in bytes, with what the RAM file says is resident."""
        return host_pb2.Ledger(
            provisioned_bytes=self._ram.page_count * PAGE_BYTES,
            resident_bytes=resident_bytes,
            hinted_total_bytes=self._hinted * PAGE_BYTES,
            reclaimed_total_bytes=self._reclaimed_total * PAGE_BYTES,
            absent_total_bytes=self._absent * PAGE_BYTES,
            skipped_total_bytes={
                hinting_pb2.SkipReason.Name(reason).lower(): pages * PAGE_BYTES
                for reason, pages in self._skipped.items()
            },
            refaulted_total_bytes=self._refaulted * PAGE_BYTES,
            reclaimed_now_bytes=PAGE_BYTES
            * (self._reclaimed_total - self._refaulted - self._unplugged),
            untouched_bytes=self.untouched.page_count * PAGE_BYTES,
            batches=self._batches,
            wire_bytes=self._wire_bytes,
            ranges=self._ranges,
            unplugged_total_bytes=self._unplugged * PAGE_BYTES,
        )

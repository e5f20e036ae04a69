"""The books of one guest: a pure state machine over sets of pages.

These two balances hold after a full look and its `audit`, until the guest's memory changes:

    resident + reclaimed_now + untouched = provisioned
    hinted_total = reclaimed_total + absent_total + sum(skipped_total)

`untouched` memory was never seen resident (or not since `left`, see below): a hint of it counts as
`absent`, not as a saving.

Memory that is plugged begins as untouched. Memory that is unplugged while it is reclaimed is
subtracted from `reclaimed_now`, and counted in a total of its own, because it did not refault:

    reclaimed_now = reclaimed_total - refaulted_total - unplugged_total

Where others take memory out of the RAM file (the hypervisor's free page reporting or its balloon),
only a look at the file shows which memory. Then an audit needs a look at all of the RAM, and enters
the pages that became absent since the last audit as reclaimed. Such totals are samples: memory that
became absent and resident again between two audits is in none of them. Of the two balances at the
top, only the first one holds for such a guest.

Memory may also leave the RAM of a guest for which nobody is known to reclaim: an operator moves the
balloon of an attached domain, or virtio-mem gives memory back. `left` enters it as untouched: it is
no saving of ours, and nothing refaulted when it comes back.
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

    :ivar totals: its sums. `resident_bytes` is 0: it is read from the RAM file when needed.
    :ivar ram: all page frames that are RAM.
    :ivar reclaimed, untouched: as in Ledger.
    """

    totals: host_pb2.Ledger
    ram: PageMap
    reclaimed: PageMap
    untouched: PageMap


def summed(one: host_pb2.Ledger, other: host_pb2.Ledger) -> host_pb2.Ledger:
    """Return the sums of two books that are closed. Only totals that never shrink are added; what
    is provisioned, resident, reclaimed or untouched now is 0 in the result."""
    sums = host_pb2.Ledger(
        hinted_total_bytes=one.hinted_total_bytes + other.hinted_total_bytes,
        reclaimed_total_bytes=one.reclaimed_total_bytes + other.reclaimed_total_bytes,
        absent_total_bytes=one.absent_total_bytes + other.absent_total_bytes,
        refaulted_total_bytes=one.refaulted_total_bytes + other.refaulted_total_bytes,
        unplugged_total_bytes=one.unplugged_total_bytes + other.unplugged_total_bytes,
        batches=one.batches + other.batches,
        wire_bytes=one.wire_bytes + other.wire_bytes,
        ranges=one.ranges + other.ranges,
    )
    for books in (one, other):
        for reason, size_bytes in books.skipped_total_bytes.items():
            sums.skipped_total_bytes[reason] += size_bytes
    return sums


class Ledger:
    """What was hinted, reclaimed and refaulted. It counts pages; `as_pb2` converts to bytes."""

    def __init__(self, ram_pages: PageMap, *, others_reclaim: bool = False) -> None:
        """Begin the books of a guest whose RAM was never touched.

        :param others_reclaim: whether memory may leave the RAM without a `post`.
        """
        self._ram = ram_pages
        self._others_reclaim = others_reclaim
        self.untouched = ram_pages
        """Pages that were never seen resident, or not since `left` entered them."""
        self.reclaimed = NO_PAGES
        """Pages that were reclaimed and have not been seen resident since."""
        # The union of `untouched` and `reclaimed`, and its size. They are kept, not computed again,
        # because every batch needs them, and computing them goes through all sections of the RAM.
        self._absent_pages, self._absent_page_count = ram_pages, ram_pages.page_count
        self._hinted = self._reclaimed_total = self._absent = self._refaulted = 0
        self._unplugged = 0
        self._skipped: Counter[hinting_pb2.SkipReason.ValueType] = Counter()
        self._batches = self._wire_bytes = self._ranges = 0

    @classmethod
    def restored(cls, ram_pages: PageMap, books: Books, *, others_reclaim: bool = False) -> Ledger:
        """Return a ledger with stored books. The caller must call `recover` next, because the guest
        has run since the books were stored.

        :param ram_pages: what is RAM now; it may differ from what was RAM in the stored books.
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
        """Bring restored books up to date from the RAM files alone.

        A page that is absent in the files and resident by the books counts as reclaimed by a batch
        that the killed host agent did not save: it is entered as hinted and reclaimed (under a
        peer, as taken by the peer: it is entered as reclaimed only). Pages that an unsaved batch
        hinted while they were absent, or that it reclaimed and the guest used again, are missing in
        the totals. The balances hold nevertheless.

        :param resident: all resident pages of the RAM; no batch may be running.
        """
        if not self._others_reclaim:
            gone = self._missing(resident)
            self._hinted += gone.page_count
            self._gone(gone)
        self.audit(resident)

    def _gone(self, pages: PageMap) -> None:
        """Enter pages as reclaimed; all of them must be resident by the books."""
        self._reclaimed_total += pages.page_count
        self.reclaimed |= pages
        self._now_absent(pages)

    def left(self, resident: PageMap) -> None:
        """Enter as untouched all pages that are resident by the books and not in `resident`.

        :param resident: all resident pages of the RAM; no batch may be running.
        """
        gone = self._missing(resident)
        self.untouched |= gone
        self._now_absent(gone)

    def _missing(self, resident: PageMap) -> PageMap:
        """Return the pages that are resident by the books and not in `resident`, which must be all
        resident pages of the RAM."""
        return self._ram - resident - self._absent_pages

    def _now_absent(self, pages: PageMap) -> None:
        """Add pages to `_absent_pages`; none of them may be in it."""
        self._absent_pages |= pages
        self._absent_page_count += pages.page_count

    def _not_absent(self, pages: PageMap) -> None:
        """Remove pages from `_absent_pages`; all of them must be in it."""
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
        """Pages that may be absent; where others reclaim, all of the RAM. An `audit` needs a look
        at no other pages."""
        return self._ram if self._others_reclaim else self._absent_pages

    def unseen_pages(self, resident_bytes: int) -> int:
        """Return how many more pages are resident in the RAM files than by the books; negative if
        fewer. Then memory left the files without a batch, or a batch is running: its outcome is not
        in the books yet.

        If no memory leaves without a batch, and no batch runs, each page that is resident by the
        books is resident in the files. Then this is exactly how many resident pages are absent by
        the books.

        :param resident_bytes: how much of the RAM files is resident.
        """
        resident_by_books = self._ram.page_count - self._absent_page_count
        return resident_bytes // PAGE_BYTES - resident_by_books

    def plugged(self, pages: PageMap) -> None:
        """Add pages to the RAM, as untouched."""
        self._ram |= pages
        self.untouched |= pages
        self._now_absent(pages)

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
        # Pages that were absent by the books, but resident when they were punched, had become
        # resident unseen: enter that first.
        self._used(self._absent_pages & outcome.reclaimed)
        self._gone(outcome.reclaimed)

    def audit(self, resident: PageMap) -> PageMap:
        """Enter the result of a look; return the pages that are resident but were absent by the
        books. Where others reclaim, enter as reclaimed the pages that were resident by the books
        and are not in `resident`.

        :param resident: the resident pages that the look found; where others reclaim, all resident
            pages of the RAM. Pages outside of `absent_pages` change nothing.
        """
        if self._others_reclaim:
            self._gone(self._missing(resident))
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
        """Return the totals in bytes.

        :param resident_bytes: how much of the RAM files is resident.
        """
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

"""The books of one guest, as a pure value machine over sets of pages.

Balance, whenever the guest stands still after an `audit`:

    resident + reclaimed_now + untouched = provisioned
    hinted_total = reclaimed_total + absent_total + sum(skipped_total)

`untouched` is what was never resident: a hint there is `absent`, not a saving.

Memory may be plugged (untouched) and unplugged. What had been reclaimed of the latter
leaves `reclaimed_now` by a total of its own, for it came back in no other way:

    reclaimed_now = reclaimed_total - refaulted_total - unplugged_total

Where somebody else takes memory out of the RAM file (the hypervisor's free page
reporting, its balloon), only the file can tell: an audit then looks at all of it, and
what is gone since the last one is entered as reclaimed. Such totals are samples: what
went and came back between two audits is in none of them; the first balance holds all
the same.
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
    """A ledger at one moment, as it is stored and opened again.

    :ivar totals: its sums; `resident_bytes` is not set, for the RAM file knows it.
    :ivar ram: all page frames that are RAM.
    :ivar reclaimed, untouched: as in Ledger.
    """

    totals: host_pb2.Ledger
    ram: PageMap
    reclaimed: PageMap
    untouched: PageMap


class Ledger:
    """What was hinted, reclaimed and refaulted. Counts pages, speaks bytes."""

    def __init__(self, ram_pages: PageMap, *, others_reclaim: bool = False) -> None:
        """Open the books of a guest whose RAM has never been touched.

        :param others_reclaim: whether memory may leave the RAM without a `post`.
        """
        self._ram = ram_pages
        self._others_reclaim = others_reclaim
        self.untouched = ram_pages
        """Pages that were never seen resident."""
        self.reclaimed = NO_PAGES
        """Pages that were reclaimed and are still absent, as of the last audit."""
        # Kept beside the two of them, for every batch asks for these, and counting and uniting
        # goes through all sections of the RAM.
        self._absent_pages, self._absent_page_count = ram_pages, ram_pages.page_count
        self._hinted = self._reclaimed_total = self._absent = self._refaulted = 0
        self._unplugged = 0
        self._skipped: Counter[hinting_pb2.SkipReason.ValueType] = Counter()
        self._batches = self._wire_bytes = self._ranges = 0

    @classmethod
    def restored(cls, ram_pages: PageMap, books: Books, *, others_reclaim: bool = False) -> Ledger:
        """Open stored books again; `recover` must follow, for the guest did not stand still.

        :param ram_pages: what is RAM now; memory may have come or gone meanwhile.
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

        What is absent there and resident by the books went with a batch that was not
        entered before the host agent was killed: it was hinted and reclaimed. What such
        a batch had hinted in vain, and what was reclaimed and used again, is in no total;
        both balances hold all the same.

        :param resident: all resident pages of the RAM; no batch may be running.
        """
        if not self._others_reclaim:
            gone = self._ram - resident - self._absent_pages
            self._hinted += gone.page_count
            self._gone(gone)
        self.audit(resident)

    def _gone(self, pages: PageMap) -> None:
        """These were reclaimed; by the books they were resident until now."""
        self._reclaimed_total += pages.page_count
        self.reclaimed |= pages
        self._absent_pages |= pages
        self._absent_page_count += pages.page_count

    def _not_absent(self, pages: PageMap) -> None:
        """These are absent by the books no more."""
        self._absent_pages -= pages
        self._absent_page_count -= pages.page_count

    def books(self) -> Books:
        """Everything in them, to be stored."""
        return Books(
            totals=self.as_pb2(resident_bytes=0),
            ram=self._ram,
            reclaimed=self.reclaimed,
            untouched=self.untouched,
        )

    @property
    def absent_pages(self) -> PageMap:
        """Where an audit has to look: pages that may be absent."""
        return self._ram if self._others_reclaim else self._absent_pages

    def unseen_pages(self, resident_bytes: int) -> int:
        """How many pages, by the sum, have come back to a RAM file of which so much is resident,
        and are absent by the books. Negative if more have left than came.

        Unless others reclaim, what is resident by the books is so in the file: so 0 says that an
        audit can find nothing, and any other number how much it will.
        """
        resident_by_books = self._ram.page_count - self._absent_page_count
        return resident_bytes // PAGE_BYTES - resident_by_books

    def plugged(self, pages: PageMap) -> None:
        """The RAM has these pages too, from now on; nothing of them was ever resident."""
        self._ram |= pages
        self.untouched |= pages
        self._absent_pages |= pages
        self._absent_page_count += pages.page_count

    def unplugged(self, pages: PageMap) -> PageMap:
        """The RAM has these pages no longer; those that were absent by the books."""
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
        # Absent by the books and reclaimed: it was resident between, unseen.
        self._used(self._absent_pages & outcome.reclaimed)
        self._gone(outcome.reclaimed)

    def audit(self, resident: PageMap) -> PageMap:
        """Take note of pages found resident; those that were absent by the books until now.

        :param resident: resident pages within `absent_pages`; others change nothing.
        """
        if self._others_reclaim:
            self._gone(self._ram - resident - self._absent_pages)
        return self._used(resident)

    def _used(self, pages: PageMap) -> PageMap:
        """These are in use; returns those that were absent by the books until now."""
        refaulted, touched = self.reclaimed & pages, self.untouched & pages
        self._refaulted += refaulted.page_count
        self.reclaimed -= refaulted
        self.untouched -= touched
        used = refaulted | touched
        self._not_absent(used)
        return used

    def as_pb2(self, resident_bytes: int) -> host_pb2.Ledger:
        """The books in bytes, beside what the RAM file says is resident."""
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

"""The books balance against a real RAM file after any history."""

import os
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.ledger import Ledger
from host_agent.ram import GuestRam, Segment
from host_agent.reclaim import reclaim, skip

PAGES = 512
runs = st.lists(st.tuples(st.integers(0, PAGES + 20), st.integers(1, 60)), min_size=1, max_size=4)


class LedgerMachine(RuleBasedStateMachine):
    """A guest that touches and hints as it likes, audited now and then."""

    def __init__(self) -> None:
        super().__init__()
        fd = os.memfd_create("ledger")
        os.truncate(fd, PAGES * PAGE_BYTES)
        self.fd = fd
        self.ram = GuestRam([Segment(pfn=0, page_count=PAGES, fd=fd, offset_bytes=0)])
        self.ledger = Ledger(self.ram.pages)
        self.refaulted_pages = 0

    def teardown(self) -> None:
        self.ram.close()

    @rule(pages=runs)
    def guest_touches(self, pages: list[tuple[int, int]]) -> None:
        for pfn, count in RangeSet(pages) & self.ram.pages:
            os.pwrite(self.fd, random.randbytes(1) * (count * PAGE_BYTES), pfn * PAGE_BYTES)

    @rule(pages=runs)
    def guest_hints(self, pages: list[tuple[int, int]]) -> None:
        hinted = RangeSet(pages)
        self.ledger.post(hinted, reclaim(self.ram, hinted, self.ledger.absent_pages), wire_bytes=3)

    @rule(pages=runs)
    def batch_is_stale(self, pages: list[tuple[int, int]]) -> None:
        hinted = RangeSet(pages)
        self.ledger.post(hinted, skip(hinted, pb.STALE), wire_bytes=3)

    @rule()
    def audit(self) -> None:
        self.ledger.audit(self.ram.resident(self.ledger.absent_pages))

    def books(self) -> host_pb2.Ledger:
        return self.ledger.as_pb2(self.ram.resident_bytes())

    @invariant()
    def every_hinted_byte_has_one_fate(self) -> None:
        books = self.books()
        fates = books.reclaimed_total_bytes + books.absent_total_bytes
        assert books.hinted_total_bytes == fates + sum(books.skipped_total_bytes.values())

    @invariant()
    def after_an_audit_the_file_agrees(self) -> None:
        self.audit()
        books = self.books()
        assert (
            books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
            == books.provisioned_bytes
        )
        assert books.reclaimed_now_bytes == self.ledger.reclaimed.page_count * PAGE_BYTES


class UnauditedLedgerMachine(LedgerMachine):
    """The same, but audited only when the history says so: nothing may be missed."""

    @invariant()
    def after_an_audit_the_file_agrees(self) -> None:
        """Not after every step; `teardown` looks once, at the end."""

    def teardown(self) -> None:
        LedgerMachine.after_an_audit_the_file_agrees(self)
        super().teardown()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestUnauditedLedger = UnauditedLedgerMachine.TestCase
TestUnauditedLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)

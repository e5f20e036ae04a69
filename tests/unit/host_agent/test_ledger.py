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
from host_agent.reclaim import Outcome, reclaim, skip

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


class PeerLedgerMachine(LedgerMachine):
    """Somebody else takes memory out of the file as well, as reporting and balloons do."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.ram.pages, others_reclaim=True)

    @invariant()
    def every_hinted_byte_has_one_fate(self) -> None:
        """Not here: what others took is among what was reclaimed."""

    @rule(pages=runs)
    def somebody_else_reclaims(self, pages: list[tuple[int, int]]) -> None:
        self.ram.punch(RangeSet(pages) & self.ram.pages)


def test_what_others_take_is_entered_as_reclaimed_and_refaulted() -> None:
    machine = PeerLedgerMachine()
    machine.guest_touches([(0, 100)])
    machine.audit()
    machine.somebody_else_reclaims([(20, 50)])
    machine.audit()
    machine.guest_touches([(60, 20)])
    machine.after_an_audit_the_file_agrees()
    books = machine.books()
    machine.teardown()
    assert books.reclaimed_total_bytes == 50 * PAGE_BYTES
    assert books.refaulted_total_bytes == 10 * PAGE_BYTES
    assert books.untouched_bytes == (PAGES - 100) * PAGE_BYTES


def test_an_audit_says_which_absent_pages_are_used_now() -> None:
    ledger = Ledger(RangeSet([(0, 100)]))
    ledger.post(
        RangeSet([(0, 50)]),
        Outcome(reclaimed=RangeSet([(0, 20)]), absent=RangeSet([(20, 30)])),
        wire_bytes=3,
    )
    assert ledger.audit(RangeSet([(10, 20)])) == RangeSet([(10, 20)])
    assert not ledger.audit(RangeSet([(10, 20)]))


TestPeerLedger = PeerLedgerMachine.TestCase
TestPeerLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestUnauditedLedger = UnauditedLedgerMachine.TestCase
TestUnauditedLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)

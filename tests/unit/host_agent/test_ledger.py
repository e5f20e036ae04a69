"""The books agree with a real RAM file when it is audited, after random histories with peers,
plugged memory and restarts."""

import os
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.memory.ledger import Ledger
from host_agent.memory.page_map import PageMap
from host_agent.memory.ram import GuestRam, Segment
from host_agent.memory.reclaim import Outcome, reclaim, skip

PAGES = 512
WHOLE = RangeSet([(0, PAGES)])
runs = st.lists(st.tuples(st.integers(0, PAGES + 20), st.integers(1, 60)), min_size=1, max_size=4)


def segment(pfn: int, page_count: int) -> Segment:
    """Return a segment in a new file. The first page of the file is not in the segment."""
    fd = os.memfd_create("ledger")
    os.truncate(fd, (1 + page_count) * PAGE_BYTES)
    return Segment(pfn=pfn, page_count=page_count, fd=fd, offset_bytes=PAGE_BYTES)


class LedgerMachine(RuleBasedStateMachine):
    """A guest whose pages are touched, hinted, plugged and unplugged in any order, with an audit
    after every step."""

    others_reclaim = False

    def __init__(self) -> None:
        super().__init__()
        self.ram = GuestRam([segment(0, PAGES)])
        self.ledger = Ledger(self.ram.page_map, others_reclaim=self.others_reclaim)
        self.refaulted_pages = 0

    def teardown(self) -> None:
        self.ram.close()

    @rule(pages=runs)
    def guest_touches(self, pages: list[tuple[int, int]]) -> None:
        for segment, parts in self.ram._parts(RangeSet(pages)):
            for part in parts:
                data = random.randbytes(1) * (part.page_count * PAGE_BYTES)
                os.pwrite(segment.fd, data, segment.to_offset(part.pfn))

    @rule(pages=runs)
    def guest_hints(self, pages: list[tuple[int, int]]) -> None:
        hinted = RangeSet(pages)
        self.ledger.post(
            hinted,
            reclaim(self.ram, hinted, self.ledger.absent_pages, self.ram.permit()),
            wire_bytes=3,
        )

    @rule(pages=runs)
    def batch_is_stale(self, pages: list[tuple[int, int]]) -> None:
        hinted = RangeSet(pages)
        self.ledger.post(hinted, skip(hinted, pb.STALE), wire_bytes=3)

    @rule()
    def audit(self) -> None:
        unseen_pages = self.ledger.unseen_pages(self.ram.resident_bytes())
        used = self.ledger.audit(self.ram.resident(self.ledger.absent_pages))
        assert self.others_reclaim or used.page_count == unseen_pages, (
            "the audit disagrees with the file's blocks"
        )
        assert not self.ledger.unseen_pages(self.ram.resident_bytes())

    @rule(start_pfn=st.integers(0, 2 * PAGES))
    def look_for_what_the_sum_says(self, start_pfn: int) -> None:
        unseen_pages = self.ledger.unseen_pages(self.ram.resident_bytes())
        if self.others_reclaim or not unseen_pages:
            return
        look = self.ram.look(self.ledger.absent_pages, start_pfn, unseen_pages)
        assert self.ledger.audit(look.resident).page_count == unseen_pages

    def books(self) -> host_pb2.Ledger:
        return self.ledger.as_pb2(self.ram.resident_bytes())

    @rule(pages=runs)
    def memory_is_unplugged(self, pages: list[tuple[int, int]]) -> None:
        gone = RangeSet(pages) & self.ram.pages
        self.ram.punch(gone, self.ram.permit())
        self.ram.unplug(gone)
        self.ledger.unplugged(PageMap(gone))

    @rule(pages=runs)
    def memory_is_plugged(self, pages: list[tuple[int, int]]) -> None:
        come = (RangeSet(pages) & WHOLE) - self.ram.pages
        self.ram.plug([segment(pfn, count) for pfn, count in come])
        self.ledger.plugged(PageMap(come))

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
        assert books.provisioned_bytes == self.ram.provisioned_bytes
        assert books.reclaimed_now_bytes == self.ledger.reclaimed.page_count * PAGE_BYTES


class UnauditedLedgerMachine(LedgerMachine):
    """Like LedgerMachine, but without the audit after every step: audits are steps themselves, and
    must miss nothing of what happened before them."""

    @invariant()
    def after_an_audit_the_file_agrees(self) -> None:
        """Do nothing: audits are steps here; `teardown` makes a last one."""

    def teardown(self) -> None:
        LedgerMachine.after_an_audit_the_file_agrees(self)
        super().teardown()


class BalloonedLedgerMachine(LedgerMachine):
    """An operator moves a balloon that the host agent does not know of, and an audit follows."""

    @rule(pages=runs)
    def an_operator_takes_memory(self, pages: list[tuple[int, int]]) -> None:
        self.audit()
        books = self.books()
        self.ram.punch(RangeSet(pages) & self.ram.pages, self.ram.permit())
        if self.ledger.unseen_pages(self.ram.resident_bytes()) < 0:
            self.ledger.left(self.ram.resident(self.ram.page_map))
        assert self.books().reclaimed_total_bytes == books.reclaimed_total_bytes, (
            "what others took is no saving"
        )


class PeerLedgerMachine(LedgerMachine):
    """Others also free memory of the file, as reporting and balloons do."""

    others_reclaim = True

    @invariant()
    def every_hinted_byte_has_one_fate(self) -> None:
        """Do not check this here: memory that others freed counts as reclaimed, too."""

    @rule(pages=runs)
    def somebody_else_reclaims(self, pages: list[tuple[int, int]]) -> None:
        self.ram.punch(RangeSet(pages) & self.ram.pages, self.ram.permit())


class RestartedLedgerMachine(LedgerMachine):
    """The host agent is killed at any point, and starts again with saved books of any age."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = self.ledger.books()

    @rule()
    def books_are_saved(self) -> None:
        self.stored = self.ledger.books()

    @rule()
    def killed_and_restarted(self) -> None:
        self.ledger = Ledger.restored(self.ram.page_map, self.stored)
        self.ledger.recover(self.ram.resident(self.ram.page_map))
        self.every_hinted_byte_has_one_fate()
        books = self.books()
        stored = self.stored.totals
        for total in ("hinted", "reclaimed", "absent", "refaulted"):
            field = f"{total}_total_bytes"
            assert getattr(books, field) >= getattr(stored, field), field
        assert (
            books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
            == books.provisioned_bytes
        )

    @rule(pages=runs)
    def killed_in_the_middle_of_a_batch(self, pages: list[tuple[int, int]]) -> None:
        # Only the first range is punched before the kill; no part of the batch is in the books.
        first, *_ = RangeSet(pages)
        self.ram.punch(RangeSet([first]) & self.ram.pages, self.ram.permit())
        self.killed_and_restarted()


def test_a_batch_that_was_not_entered_is_derived_from_the_file() -> None:
    machine = LedgerMachine()
    machine.guest_touches([(0, 100)])
    machine.audit()
    machine.guest_hints([(0, 10)])
    stored = machine.ledger.books()
    machine.guest_hints([(50, 50)])
    machine.guest_touches([(5, 5), (200, 10)])
    machine.ledger = Ledger.restored(machine.ram.page_map, stored)
    machine.ledger.recover(machine.ram.resident(machine.ram.page_map))
    books = machine.books()
    machine.teardown()
    assert books.hinted_total_bytes == books.reclaimed_total_bytes == 60 * PAGE_BYTES
    assert books.refaulted_total_bytes == 5 * PAGE_BYTES
    assert books.reclaimed_now_bytes == 55 * PAGE_BYTES
    assert books.untouched_bytes == (PAGES - 110) * PAGE_BYTES


def test_restored_books_are_the_same_books() -> None:
    ledger = Ledger(PageMap([(0, 100)]))
    ledger.post(
        RangeSet([(0, 60)]),
        Outcome(
            reclaimed=PageMap([(0, 20)]),
            absent=PageMap([(20, 30)]),
            skipped={pb.STALE: RangeSet([(50, 10)])},
        ),
        wire_bytes=3,
    )
    ledger.audit(PageMap([(10, 20)]))
    again = Ledger.restored(PageMap([(0, 100)]), ledger.books())
    assert again.books() == ledger.books()


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


def test_what_was_reclaimed_and_unplugged_is_no_saving_any_more() -> None:
    machine = LedgerMachine()
    machine.guest_touches([(0, 100)])
    machine.guest_hints([(0, 60)])
    machine.memory_is_unplugged([(40, 80)])
    machine.after_an_audit_the_file_agrees()
    books = machine.books()
    machine.memory_is_plugged([(40, 80)])
    machine.after_an_audit_the_file_agrees()
    again = machine.books()
    machine.teardown()
    assert books.provisioned_bytes == (PAGES - 80) * PAGE_BYTES
    assert books.reclaimed_total_bytes == 60 * PAGE_BYTES
    assert books.unplugged_total_bytes == 20 * PAGE_BYTES
    assert books.reclaimed_now_bytes == again.reclaimed_now_bytes == 40 * PAGE_BYTES
    assert again.untouched_bytes == books.untouched_bytes + 80 * PAGE_BYTES


def test_a_file_without_pages_of_the_ram_is_closed() -> None:
    ram = GuestRam([segment(0, 10)])
    dimm = segment(100, 10)
    ram.plug([dimm])
    os.pwrite(dimm.fd, b"x" * 11 * PAGE_BYTES, 0)
    ram.punch(RangeSet([(100, 4), (108, 2)]), ram.permit())
    ram.unplug(RangeSet([(100, 4), (108, 2)]))
    assert ram.pages == RangeSet([(0, 10), (104, 4)])
    assert ram.resident_bytes() == 5 * PAGE_BYTES, "the page that is not the guest's counts, too"
    assert ram.resident(PageMap([(0, 200)])) == PageMap([(104, 4)])
    ram.unplug(RangeSet([(104, 4)]))
    assert ram.resident_bytes() == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(dimm.fd)
    ram.close()


def test_an_audit_says_which_absent_pages_are_used_now() -> None:
    ledger = Ledger(PageMap([(0, 100)]))
    ledger.post(
        RangeSet([(0, 50)]),
        Outcome(reclaimed=PageMap([(0, 20)]), absent=PageMap([(20, 30)])),
        wire_bytes=3,
    )
    assert ledger.audit(PageMap([(10, 20)])) == PageMap([(10, 20)])
    assert not ledger.audit(PageMap([(10, 20)]))


TestRestartedLedger = RestartedLedgerMachine.TestCase
TestRestartedLedger.settings = settings(max_examples=40, stateful_step_count=30)
TestPeerLedger = PeerLedgerMachine.TestCase
TestPeerLedger.settings = settings(max_examples=40, stateful_step_count=30)
TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30)
TestUnauditedLedger = UnauditedLedgerMachine.TestCase
TestUnauditedLedger.settings = settings(max_examples=40, stateful_step_count=30)
TestBalloonedLedger = BalloonedLedgerMachine.TestCase
TestBalloonedLedger.settings = settings(max_examples=40, stateful_step_count=30)

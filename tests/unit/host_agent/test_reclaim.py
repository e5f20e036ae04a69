"""Reclaim drops exactly the hinted pages that are RAM, and reports which were resident. An audit of
the RAM file finds what is resident."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.cache_count import cached_bytes
from host_agent.memory.page_map import PageMap
from host_agent.memory.ram import GuestRam, Segment
from host_agent.memory.reclaim import reclaim, skip

page_sets = st.lists(st.tuples(st.integers(0, 5200), st.integers(1, 300)), max_size=8).map(RangeSet)
on_real_memory = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def offset_bytes(pfn: int) -> int:
    """Return a page's offset in the file of the fixture `ram`."""
    return (pfn if pfn < 1024 else pfn - 1024) * PAGE_BYTES


def touch(fd: int, pages: RangeSet) -> None:
    for pfn, count in pages:
        for page in range(pfn, pfn + count):
            os.pwrite(fd, page.to_bytes(8, "big") * (PAGE_BYTES // 8), offset_bytes(page))


@on_real_memory
@given(touched=page_sets, hinted=page_sets)
def test_every_hinted_page_has_one_outcome(
    ram: GuestRam, ram_fd: int, touched: RangeSet, hinted: RangeSet
) -> None:
    ram.punch(ram.pages, ram.permit())
    touch(ram_fd, touched & ram.pages)
    outcome = reclaim(ram, hinted, ram.page_map, ram.permit())
    assert outcome.reclaimed.ranges() == touched & hinted & ram.pages
    assert outcome.absent.ranges() == (hinted & ram.pages) - touched
    assert outcome.skipped.get(pb.OUTSIDE_RAM, RangeSet()) == hinted - ram.pages
    left = (touched & ram.pages) - hinted
    assert ram.resident(ram.page_map).ranges() == left
    assert ram.resident_bytes() == left.page_count * PAGE_BYTES


@on_real_memory
@given(touched=page_sets, hinted=page_sets)
def test_what_was_not_hinted_keeps_its_contents(
    ram: GuestRam, ram_fd: int, touched: RangeSet, hinted: RangeSet
) -> None:
    touch(ram_fd, touched & ram.pages)
    reclaim(ram, hinted, ram.page_map, ram.permit())
    for pfn, count in (touched & ram.pages) - hinted:
        for page in (pfn, pfn + count - 1):
            assert os.pread(ram_fd, 8, offset_bytes(page)) == page.to_bytes(8, "big")


def test_memory_that_is_dropped_during_an_audit_is_absent(
    ram: GuestRam, ram_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU itself may drop memory meanwhile: the audit must end, and not count it as resident."""
    touch(ram_fd, RangeSet([(0, 4), (8, 2)]))
    lseek, calls = os.lseek, 0

    def lseek_in_a_race(fd: int, at: int, whence: int) -> int:
        nonlocal calls
        calls += 1
        assert calls < 100, "the audit does not end"
        found = lseek(fd, at, whence)
        if calls == 1:
            ram.punch(RangeSet([(0, 4)]), ram.permit())
        return found

    monkeypatch.setattr(os, "lseek", lseek_in_a_race)
    assert ram.resident(ram.page_map).ranges() == RangeSet([(8, 2)])


def test_an_audit_ends_when_it_has_found_enough(ram: GuestRam, ram_fd: int) -> None:
    """The next audit begins where this one has found pages, because memory often comes back where
    it came back last."""
    far = RangeSet([(4097, 2)])
    touch(ram_fd, far)
    touch(ram_fd, RangeSet([(8, 2)]))
    look = ram.look(ram.page_map, 4096, 2)
    assert look.resident.ranges() == far
    again = ram.look(ram.page_map - PageMap(far), look.next_pfn, 2)
    assert again.resident.ranges() == RangeSet([(8, 2)]), "the audit wraps around to the start"


def test_an_audit_that_ran_out_of_time_continues_where_it_ended(ram: GuestRam, ram_fd: int) -> None:
    """Otherwise each audit would begin with the same memory, and none would reach the rest."""
    touch(ram_fd, RangeSet([(8, 2), (4097, 2)]))
    first = ram.look(ram.page_map, 0, slice_s=0)
    assert first.resident.ranges() == RangeSet([(8, 2)])
    second = ram.look(ram.page_map, first.next_pfn, slice_s=0)
    assert second.resident.ranges() == RangeSet([(4097, 2)])


def test_a_small_audit_does_not_walk_through_resident_memory_behind_it() -> None:
    """Otherwise the cost of an audit would depend on how much memory a guest uses, not on how much
    came back."""
    fd = os.memfd_create("sea")
    os.truncate(fd, 64 * MIB)
    os.pwrite(fd, bytes(64 * MIB - PAGE_BYTES), PAGE_BYTES)
    ram = GuestRam([Segment(pfn=0, page_count=64 * MIB // PAGE_BYTES, fd=fd, offset_bytes=0)])
    if not cached_bytes(fd, PAGE_BYTES, PAGE_BYTES):
        pytest.skip("this kernel has no cachestat")
    asked = []
    lseek = os.lseek

    def counted(fd: int, at: int, whence: int) -> int:
        asked.append(whence)
        return lseek(fd, at, whence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "lseek", counted)
        assert ram.resident(PageMap([(0, 16)])).ranges() == RangeSet([(1, 15)])
    assert os.SEEK_HOLE not in asked
    ram.close()


@on_real_memory
@given(touched=page_sets, within=page_sets, start_pfn=st.integers(0, 6000), counts=st.booleans())
def test_an_audit_finds_what_is_resident(
    ram: GuestRam, ram_fd: int, touched: RangeSet, within: RangeSet, start_pfn: int, counts: bool
) -> None:
    """It finds all of that from any start, and on kernels without cachestat, too."""
    ram.punch(ram.pages, ram.permit())
    touch(ram_fd, touched & ram.pages)
    with pytest.MonkeyPatch.context() as patch:
        if not counts:
            patch.setattr("host_agent.memory.ram.cached_bytes", lambda *_: 0)
        look = ram.look(PageMap(within), start_pfn)
    assert look.resident.ranges() == touched & within & ram.pages


def test_a_punch_that_the_kernel_refuses_is_skipped_with_the_reason() -> None:
    writable = os.memfd_create("refusing", os.MFD_ALLOW_SEALING)
    os.pwrite(writable, b"\1" * (8 * PAGE_BYTES), 0)
    read_only = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    ram = GuestRam([Segment(pfn=0, page_count=8, fd=read_only, offset_bytes=0)])
    hinted = RangeSet([(2, 4)])
    outcome = reclaim(ram, hinted, ram.page_map, ram.permit())
    assert outcome.skipped == {pb.HOST_ERROR: hinted}
    assert not outcome.reclaimed
    assert not outcome.absent
    assert ram.resident_bytes() == 8 * PAGE_BYTES
    ram.close()
    os.close(writable)


def test_a_skipped_batch_touches_nothing(ram: GuestRam, ram_fd: int) -> None:
    touch(ram_fd, RangeSet([(0, 16)]))
    outcome = skip(RangeSet([(0, 16)]), pb.STALE)
    assert outcome.skipped == {pb.STALE: RangeSet([(0, 16)])}
    assert ram.resident_bytes() == 16 * PAGE_BYTES


def test_closing_frees_the_memory_and_the_descriptors(ram_fd: int) -> None:
    ram = GuestRam([Segment(pfn=0, page_count=8, fd=ram_fd, offset_bytes=0)])
    ram.close()
    ram.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ram_fd)

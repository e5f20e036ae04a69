"""The workload holds, verifies and frees memory, and runs loops. It counts pages that were dropped
in use as wrong, and keeps what it holds when memory runs out, is plugged or is unplugged."""

import mmap
import os
import zlib
from collections.abc import Iterator

import pytest

from guest_agent.memory.blocks import MemoryBlocks
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.workload.holding import Pattern
from guest_agent.workload.memory import AnonymousSource, BuddyPlugs, BuddySource
from guest_agent.workload.source import EXTENT_BYTES, Source
from guest_agent.workload.workload import Workload
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet, encode
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.session.validation import check_done

RAM_BYTES = 64 * MIB


@pytest.fixture
def ram() -> Iterator[mmap.mmap]:
    fd = os.memfd_create("test")
    os.truncate(fd, RAM_BYTES)
    with mmap.mmap(fd, RAM_BYTES) as mapped:
        yield mapped
    os.close(fd)


def anonymous_source() -> AnonymousSource:
    """Return the source of a guest with RAM_BYTES of memory and a little to spare; it does not wait
    for more."""
    source = AnonymousSource(RAM_BYTES, lambda: RAM_BYTES + 8 * MIB - used_bytes(), timeout_s=0)
    before = source._allocator.free_page_count

    def used_bytes() -> int:
        return (before - source._allocator.free_page_count) * PAGE_BYTES

    return source


@pytest.fixture(params=["buddy", "anonymous"])
def source(request: pytest.FixtureRequest, ram: mmap.mmap) -> Source:
    if request.param == "anonymous":
        return anonymous_source()
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, RAM_BYTES // PAGE_BYTES)]))
    return BuddySource(BuddyAllocator([zone], chunk_order=9), ram)


def allocate(size_bytes: int, number: int = 1) -> pb.WorkloadCommand:
    order = pb.Allocate(size_bytes=size_bytes, seed=7)
    return pb.WorkloadCommand(command_id=number, allocate=order)


def free(size_bytes: int, number: int = 2) -> pb.WorkloadCommand:
    return pb.WorkloadCommand(command_id=number, free=pb.Free(size_bytes=size_bytes, seed=7))


VERIFY = pb.WorkloadCommand(command_id=3, verify=pb.Verify())


def test_held_memory_verifies(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    done = workload.run(allocate(20 * MIB))
    assert (done.changed_bytes, done.held_bytes, done.error) == (20 * MIB, 20 * MIB, "")
    done = workload.run(free(12 * MIB))
    assert (done.changed_bytes, done.held_bytes) == (12 * MIB, 8 * MIB)
    assert (done.verified_pages, done.wrong_pages) == (12 * MIB // PAGE_BYTES, 0)
    done = workload.run(VERIFY)
    assert (done.verified_pages, done.wrong_pages) == (8 * MIB // PAGE_BYTES, 0)


def fragments(size_bytes: int, block_bytes: int) -> pb.WorkloadCommand:
    order = pb.Allocate(size_bytes=size_bytes, seed=7, block_bytes=block_bytes)
    return pb.WorkloadCommand(command_id=4, allocate=order)


def test_fragments_keep_what_is_freed_between_them_from_being_a_chunk(ram: mmap.mmap) -> None:
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, RAM_BYTES // PAGE_BYTES)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    workload = Workload(BuddySource(allocator, ram), BuddyPlugs(allocator))
    workload.run(fragments(48 * MIB, 64 << 10))
    free_chunks = len(allocator.unreported_chunks(allocator.zones[0], 99))
    for share in (2, 4):  # free every other one, then three of every four that are left
        done = workload.run(free(workload.held_bytes - workload.held_bytes // share))
        assert done.changed_bytes == done.verified_pages * PAGE_BYTES
        assert len(allocator.unreported_chunks(allocator.zones[0], 99)) == free_chunks
    assert workload.held_bytes == 6 * MIB
    assert workload.run(VERIFY).wrong_pages == 0
    workload.run(free(RAM_BYTES))
    assert len(allocator.unreported_chunks(allocator.zones[0], 99)) == 24


def test_extents_and_fragments_are_held_and_freed_side_by_side(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    workload.run(fragments(8 * MIB, 4096))
    workload.run(allocate(16 * MIB))
    workload.run(fragments(8 * MIB, 1 * MIB))
    done = workload.run(free(16 * MIB))
    assert (done.changed_bytes, done.wrong_pages) == (16 * MIB, 0), "half of each"
    done = workload.run(VERIFY)
    assert (done.verified_pages, done.wrong_pages) == (16 * MIB // PAGE_BYTES, 0)
    assert workload.run(free(16 * MIB)).held_bytes == 0
    assert workload.run(allocate(56 * MIB)).error == ""


@pytest.mark.parametrize("block_bytes", [1, 4095, 3 * 4096, 4 * MIB])
def test_blocks_of_a_size_that_would_overlap_are_refused(source: Source, block_bytes: int) -> None:
    done = Workload(source, MemoryBlocks()).run(fragments(8 * MIB, block_bytes))
    assert "not a power of two" in done.error
    assert done.held_bytes == 0


def test_memory_can_be_compressed_as_well_as_was_asked(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(source, MemoryBlocks())
    written: list[bytes] = []
    monkeypatch.setattr(source, "write", lambda _, data: written.append(bytes(data)))
    for percent in (0, 50, 90):
        order = pb.Allocate(size_bytes=4 * MIB, seed=7, compressible_percent=percent)
        workload.run(pb.WorkloadCommand(command_id=4, allocate=order))
        pages = [written[-1][at : at + PAGE_BYTES] for at in range(0, 2 * MIB, PAGE_BYTES)]
        sizes = [len(zlib.compress(page, 1)) / PAGE_BYTES for page in pages]
        assert max(sizes) == pytest.approx(1 - percent / 100, abs=0.03)
        assert len(set(pages)) == len(pages)


def test_compressible_memory_is_verified(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    order = pb.Allocate(size_bytes=16 * MIB, seed=7, compressible_percent=50)
    assert workload.run(pb.WorkloadCommand(command_id=4, allocate=order)).error == ""
    workload.run(allocate(16 * MIB))
    done = workload.run(VERIFY)
    assert (done.verified_pages, done.wrong_pages) == (32 * MIB // PAGE_BYTES, 0)
    assert workload.run(free(32 * MIB)).wrong_pages == 0
    order.compressible_percent = 91
    assert "91 %" in workload.run(pb.WorkloadCommand(command_id=5, allocate=order)).error


def test_freed_memory_is_used_again(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    for _ in range(20):
        assert workload.run(allocate(40 * MIB)).error == ""
        assert workload.run(free(40 * MIB)).wrong_pages == 0
    assert workload.held_bytes == 0


def test_a_full_guest_reports_an_error_and_is_not_killed() -> None:
    """The workload waits for memory first, because memory that is isolated, or in the balloon, may
    come back."""
    available = [100 * MIB, 0, 0, 100 * MIB, 0]
    source = AnonymousSource(
        RAM_BYTES, lambda: available.pop(0) if len(available) > 1 else 9 * MIB, timeout_s=0.5
    )
    workload = Workload(source, MemoryBlocks())
    assert workload.run(allocate(20 * MIB)).error == ""
    done = workload.run(allocate(40 * MIB))
    assert done.error == "the guest is out of memory: only 9 MiB are available"
    assert done.held_bytes == 32 * MIB
    assert workload.run(VERIFY).wrong_pages == 0


def test_small_blocks_that_are_left_over_leave_room_for_extents() -> None:
    """A real guest's kernel can back an extent with free pages from anywhere."""
    source = anonymous_source()
    small = [source.allocate(PAGE_BYTES) for _ in range(RAM_BYTES // PAGE_BYTES)]
    for at in small[::2]:
        source.free(at, PAGE_BYTES)
    for _ in range(RAM_BYTES // 2 // EXTENT_BYTES):
        source.allocate(EXTENT_BYTES)


def test_a_page_dropped_in_use_is_counted_as_wrong(ram: mmap.mmap) -> None:
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, RAM_BYTES // PAGE_BYTES)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    workload = Workload(BuddySource(allocator, ram), BuddyPlugs(allocator))
    workload.run(allocate(20 * MIB))
    lost = 3 * PAGE_BYTES
    ram.madvise(mmap.MADV_REMOVE, RAM_BYTES - EXTENT_BYTES, lost)
    held_there = any(ram[RAM_BYTES - EXTENT_BYTES + lost :])
    done = workload.run(VERIFY)
    assert held_there, "the allocator hands out the highest block first"
    assert done.wrong_pages == 3


def test_running_out_of_memory_is_an_error_and_keeps_held_memory(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    done = workload.run(allocate(2 * RAM_BYTES))
    assert "out of memory" in done.error
    assert 0 < done.held_bytes == workload.held_bytes < RAM_BYTES + 1
    assert workload.run(VERIFY).wrong_pages == 0


def test_plugging_and_unplugging_keep_held_memory(ram: mmap.mmap) -> None:
    half = RAM_BYTES // PAGE_BYTES // 2
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, half)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    workload = Workload(BuddySource(allocator, ram), BuddyPlugs(allocator))
    packed = encode(RangeSet([(half, half)]))
    online = pb.WorkloadCommand(command_id=4, online=pb.Online(ranges=packed))
    offline = pb.WorkloadCommand(command_id=5, offline=pb.Offline(ranges=packed))

    assert "out of memory" in workload.run(allocate(40 * MIB)).error
    for _ in range(2):  # the second time, all is online already
        assert workload.run(online).error == ""
    assert workload.run(allocate(20 * MIB)).error == ""
    done = workload.run(offline)
    assert "in use" in done.error
    assert (done.changed_bytes, done.held_bytes) == (0, workload.held_bytes)
    assert workload.run(VERIFY).wrong_pages == 0
    workload.run(free(RAM_BYTES))
    for _ in range(2):
        assert workload.run(offline).error == ""
    assert allocator.zones[0].present == RangeSet([(0, half)])


def test_patterns_of_neighbouring_keys_differ_in_every_page() -> None:
    pattern = Pattern()
    for key in range(1, 200):
        a, b = pattern.of(key).tobytes(), pattern.of(key + 1).tobytes()
        pages = range(0, EXTENT_BYTES, PAGE_BYTES)
        assert all(a[at : at + PAGE_BYTES] != b[at : at + PAGE_BYTES] for at in pages)


def loop(pattern: pb.Loop.Pattern.ValueType, **settings: int) -> pb.WorkloadCommand:
    settings = {"size_bytes": 16 * MIB, "duration_ms": 350, **settings}
    return pb.WorkloadCommand(command_id=6, loop=pb.Loop(pattern=pattern, seed=7, **settings))


LOOPS = (pb.Loop.CHURN, pb.Loop.FAULT, pb.Loop.BANDWIDTH)


@pytest.mark.parametrize("pattern", LOOPS)
def test_a_loop_measures_and_leaves_what_is_held_alone(
    source: Source, pattern: pb.Loop.Pattern.ValueType
) -> None:
    workload = Workload(source, MemoryBlocks())
    workload.run(allocate(20 * MIB))
    done = workload.run(loop(pattern))
    assert (done.error, done.held_bytes, done.changed_bytes) == ("", 20 * MIB, 0)
    assert done.duration_us >= 350_000
    looped = done.looped
    assert looped.touched_bytes > 0
    assert looped.cycles == looped.touched_bytes // (16 * MIB), "whole cycles"
    assert 0 < sum(looped.bytes_per_s.counts) <= done.duration_us / 100_000
    extents = sum(looped.allocation_us.counts)
    assert extents * EXTENT_BYTES == (0 if pattern == pb.Loop.BANDWIDTH else looped.touched_bytes)
    verified = {pb.Loop.CHURN: looped.touched_bytes, pb.Loop.FAULT: 0, pb.Loop.BANDWIDTH: 16 * MIB}
    assert (done.verified_pages, done.wrong_pages) == (verified[pattern] // PAGE_BYTES, 0)
    assert workload.run(VERIFY).verified_pages == 20 * MIB // PAGE_BYTES
    assert workload.run(allocate(40 * MIB)).error == "", "the loop's memory is free again"


@pytest.mark.parametrize("pattern", LOOPS)
def test_a_loop_that_runs_out_of_memory_frees_what_it_took(
    source: Source, pattern: pb.Loop.Pattern.ValueType
) -> None:
    workload = Workload(source, MemoryBlocks())
    done = workload.run(loop(pattern, size_bytes=2 * RAM_BYTES, duration_ms=60_000))
    assert "out of memory" in done.error
    assert done.held_bytes == 0
    assert workload.run(allocate(56 * MIB)).error == ""


def test_the_host_believes_a_loop_that_runs_out_of_memory_after_many_cycles(ram: mmap.mmap) -> None:
    class Scarce(BuddySource):
        left = 100

        def allocate(self, size_bytes: int) -> int:
            self.left -= 1
            if self.left < 0:
                raise MemoryError("no memory comes back")
            return super().allocate(size_bytes)

    zone = ZoneSpec(name="Normal", present=RangeSet([(0, RAM_BYTES // PAGE_BYTES)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    workload = Workload(Scarce(allocator, ram), BuddyPlugs(allocator))
    done = workload.run(loop(pb.Loop.CHURN, duration_ms=60_000))
    assert done.error == "the guest is out of memory: no memory comes back"
    assert done.verified_pages == 100 * EXTENT_BYTES // PAGE_BYTES > RAM_BYTES // PAGE_BYTES
    check_done(done, RAM_BYTES)


def test_a_pause_between_cycles(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    done = workload.run(loop(pb.Loop.CHURN, duration_ms=1000, pause_ms=400, size_bytes=2 * MIB))
    assert 1 <= done.looped.cycles <= 3


def test_a_page_dropped_during_a_loop_is_counted_as_wrong(ram: mmap.mmap) -> None:
    """Loop bandwidth copies memory, and checks that each copy has the pattern of its source."""

    class Dropping(BuddySource):
        def copy(self, source_at: int, target_at: int) -> None:
            super().copy(source_at, target_at)
            ram.madvise(mmap.MADV_REMOVE, target_at, 2 * PAGE_BYTES)

    zone = ZoneSpec(name="Normal", present=RangeSet([(0, RAM_BYTES // PAGE_BYTES)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    workload = Workload(Dropping(allocator, ram), BuddyPlugs(allocator))
    assert workload.run(loop(pb.Loop.BANDWIDTH)).wrong_pages == 4 * 2


def test_a_loop_that_would_do_nothing_is_an_error(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    done = workload.run(loop(pb.Loop.BANDWIDTH, size_bytes=2 * MIB))
    assert "needs at least 4 MiB" in done.error
    for pattern in (pb.Loop.CHURN, pb.Loop.FAULT):
        assert "its size is 0" in workload.run(loop(pattern, size_bytes=0)).error
    assert workload.run(loop(pb.Loop.BANDWIDTH, size_bytes=4 * MIB)).looped.cycles > 0


def test_a_loop_ends_when_its_agent_ends(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    workload.stop()
    assert workload.run(loop(pb.Loop.CHURN, duration_ms=3_600_000)).duration_us < 60_000_000


def test_an_unknown_command_or_loop_is_an_error(source: Source) -> None:
    workload = Workload(source, MemoryBlocks())
    assert "does not know the command" in workload.run(pb.WorkloadCommand(command_id=1)).error
    unknown = loop(pb.Loop.PATTERN_UNSPECIFIED)
    assert "does not know the loop" in workload.run(unknown).error


def test_a_long_error_is_cut_to_what_a_host_accepts() -> None:
    """The host takes a longer one for an attack, and would never learn the reason."""

    class Stuck(MemoryBlocks):
        def online(self, pages: RangeSet) -> None:
            raise Refused(f"{pages} stay offline: " + "memory1234, " * 200)

    command = pb.WorkloadCommand(command_id=1, online=pb.Online(ranges=encode(RangeSet([(0, 1)]))))
    done = Workload(anonymous_source(), Stuck()).run(command)
    check_done(done, RAM_BYTES)
    assert "stay offline" in done.error

"""The hugetlb isolator on a model of the kernel's free list, which is last in, first out."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from guest_agent.isolation.hugetlb import HugetlbIsolator
from guest_agent.isolation.hugetlb_pool import CHUNK_PAGES
from guest_agent.isolation.isolator import HeldPages
from hintfleet.errors import TransientError
from hintfleet.ranges import EMPTY, RangeSet

RESERVE_CHUNKS = 6
THRESHOLD_CHUNKS = 4


class ModelKernel:
    """A guest of `count` chunks and the host memory behind them. At the start all chunks are free,
    and all but the reserve are resident."""

    def __init__(self, count: int, *, zeroing: bool, reserve: int = RESERVE_CHUNKS) -> None:
        self.free = list(range(count))
        self.used: list[int] = []
        self.pool: list[int] = []
        self.resident = set(self.free[reserve:])
        self.zeroing = zeroing
        self.reserve = reserve
        self.looks = 0
        self.withheld = 0
        self.shared = False
        self.reads = 0
        self.now_s = 0.0
        self.growing_takes_s = 0.0

    # The methods of `Pool`, which the isolator calls

    def open(self) -> RangeSet:
        return self.chunks()

    def free_chunks(self) -> int:
        self.reads += 1
        return len(self.free)

    def free_ranges(self) -> RangeSet:
        return ranges_of(self.free)

    def reserve_chunks(self) -> int:
        return self.reserve

    def grow(self, chunks: int) -> int:
        self.now_s += self.growing_takes_s
        if self.shared:
            raise TransientError("somebody else uses the pool")
        came = max(0, min(chunks, len(self.free) - self.withheld))
        assert len(self.free) - came >= self.reserve or not came, "the reserve was touched"
        for _ in range(came):
            self.pool.append(self.free.pop())
        if self.zeroing:
            self.resident |= set(self.pool[len(self.pool) - came :])
        return came

    def chunks(self) -> RangeSet:
        self.looks += 1
        return ranges_of(self.pool)

    def empty(self) -> None:
        self.free += reversed(self.pool)
        self.pool = []

    def close(self) -> None:
        pass

    # What the guest and the host do

    def allocate(self, count: int) -> None:
        for _ in range(min(count, len(self.free))):
            self.used.append(self.free.pop())
        self.resident |= set(self.used)

    def release(self, count: int, first: int = 0) -> None:
        given = self.used[first : first + count]
        del self.used[first : first + count]
        self.free += given

    def punch(self, ranges: RangeSet) -> None:
        chunks = chunks_of(ranges)
        assert chunks <= set(self.pool), "hinted, but not isolated"
        self.resident -= chunks


def ranges_of(chunks: Iterable[int]) -> RangeSet:
    return RangeSet((chunk * CHUNK_PAGES, CHUNK_PAGES) for chunk in chunks)


def chunks_of(ranges: RangeSet) -> set[int]:
    return {pfn // CHUNK_PAGES for r in ranges for pfn in range(r.pfn, r.end_pfn, CHUNK_PAGES)}


class Host:
    """Acknowledges batches, and reports which chunks became resident since the last report. The
    first report has all resident chunks that are free or in the pool."""

    def __init__(self, kernel: ModelKernel, isolator: HugetlbIsolator) -> None:
        self.kernel, self.isolator = kernel, isolator
        self.known_absent = {*kernel.free, *kernel.pool}
        self.hinted_absent = 0

    def tell_used(self) -> None:
        used = self.known_absent & self.kernel.resident
        self.known_absent -= used
        self.isolator.refaulted(RangeSet((chunk * CHUNK_PAGES, 1) for chunk in used))

    def run(self, *, at_a_time: int = 4, asked: bool = False) -> int:
        """Run passes until no more is worthwhile; return how many chunks were hinted.

        :param asked: request the first pass, as a settle does.
        """
        self.tell_used()
        if asked:
            self.isolator.report_now(thorough=True)
        hinted = 0
        while not self.isolator.idle() or asked:
            asked = False
            flight: list[RangeSet] = []
            while (batch := self.isolator.isolate(at_a_time, 1 << 20)) or flight:
                if batch:
                    flight.append(batch)
                    hinted += len(chunks_of(batch))
                if not batch or len(flight) == 2:
                    self.acknowledge(flight.pop(0))
        return hinted

    def acknowledge(self, batch: RangeSet) -> None:
        chunks = chunks_of(batch)
        self.hinted_absent += len(chunks - self.kernel.resident)
        self.kernel.punch(batch)
        self.known_absent |= chunks
        self.isolator.release(batch, hinted=True)


def started(kernel: ModelKernel, threshold_chunks: int = 1) -> tuple[HugetlbIsolator, Host]:
    isolator = HugetlbIsolator(
        kernel,
        threshold_chunks=threshold_chunks,
        zeroing=kernel.zeroing,
        clock=lambda: kernel.now_s,
    )
    isolator.start(lambda: None)
    host = Host(kernel, isolator)
    host.tell_used()
    return isolator, host


@pytest.mark.parametrize("zeroing", [False, True])
def test_all_is_hinted_although_the_kernel_allocates_first_what_was_freed_last(
    zeroing: bool,
) -> None:
    kernel = ModelKernel(200, zeroing=zeroing)
    _, host = started(kernel)
    host.run()
    for _ in range(3):
        kernel.allocate(150)
        host.tell_used()
        for _ in range(10):  # freed in parts; a pass is requested after each
            kernel.release(15)
            host.run(asked=True)
        assert not kernel.resident & set(kernel.free)


def test_absent_chunks_are_not_hinted() -> None:
    kernel = ModelKernel(100, zeroing=False)
    _, host = started(kernel)
    host.run()
    host.hinted_absent = 0
    kernel.allocate(40)
    kernel.release(40)
    assert host.run() == 40
    assert not host.hinted_absent


def test_chunks_used_and_freed_between_two_polls_are_hinted() -> None:
    kernel = ModelKernel(100, zeroing=False)
    _, host = started(kernel, threshold_chunks=16)
    host.run()
    for _ in range(5):
        kernel.allocate(30)
        kernel.release(30)
        assert host.run() == 30
    assert not kernel.resident


def test_a_pass_with_nothing_to_gain_costs_one_read() -> None:
    kernel = ModelKernel(100, zeroing=False)
    isolator, host = started(kernel)
    host.run()
    kernel.reads = 0
    assert isolator.idle()
    assert kernel.reads == 1
    assert not kernel.pool


@pytest.mark.parametrize(("chunks", "reserve", "bound"), [(500, 31, 32), (4096, 256, 64)])
def test_zeroing_makes_no_more_than_64_mib_or_a_64th_resident(
    chunks: int, reserve: int, bound: int
) -> None:
    kernel = ModelKernel(chunks, zeroing=True, reserve=reserve)
    kernel.resident.clear()
    isolator, host = started(kernel)
    isolator.refaulted(ranges_of(kernel.free))  # reported, though nothing is resident
    most = 0
    while batch := isolator.isolate(512, 1 << 20):
        most = max(most, len(kernel.resident))
        assert not isolator.isolate(512, 1 << 20), "what was zeroed before is still resident"
        host.acknowledge(batch)
    assert most == bound
    assert kernel.looks <= 64, "each step reads all page flags"
    assert not kernel.pool
    assert not kernel.resident


def test_zeroing_needs_more_to_gain() -> None:
    kernel = ModelKernel(326, zeroing=True)
    _, host = started(kernel, threshold_chunks=4)
    host.run()
    kernel.allocate(30)
    kernel.release(30)
    assert not host.run(), "30 chunks to gain, but finding them may zero 320"
    assert host.run(asked=True) == 32, "they were at the head of the free list"
    assert not host.run(asked=True), "nothing was used meanwhile"


def test_a_batch_that_the_host_skipped_is_hinted_again() -> None:
    kernel = ModelKernel(20, zeroing=False)
    isolator, host = started(kernel)
    batch = isolator.isolate(512, 1 << 20)
    isolator.release(batch, hinted=False)
    assert isolator.isolate(512, 1 << 20) == batch
    isolator.release(batch, hinted=False)
    assert not isolator.idle()
    assert not kernel.pool, "the pass was not continued"
    assert host.run() == 14


def test_a_lost_host_leaves_the_reserve_to_the_guest() -> None:
    kernel = ModelKernel(50, zeroing=False)
    isolator, host = started(kernel)
    host.acknowledge(isolator.isolate(44, 1 << 20))
    batch = isolator.isolate(4, 1 << 20)
    held = len(kernel.pool)
    kernel.allocate(5)
    for _ in range(10):
        assert isolator.idle()
        assert len(kernel.pool) == held, "a batch is in flight: nothing may leave the pool"
    isolator.release(batch, hinted=False)  # as after a new Welcome
    kernel.release(5)
    host.run()
    assert not kernel.pool


def test_an_allowance_that_is_used_up_ends_the_pass() -> None:
    kernel = ModelKernel(50, zeroing=False)
    isolator, host = started(kernel)
    host.acknowledge(isolator.isolate(512, 8 * CHUNK_PAGES))
    assert kernel.pool
    assert not isolator.isolate(512, CHUNK_PAGES - 1)
    assert not isolator.idle()
    assert not kernel.pool
    assert host.run() == 41


def test_chunks_that_a_dead_agent_left_are_hinted_by_the_next_agent() -> None:
    kernel = ModelKernel(50, zeroing=False)
    dead, host = started(kernel)
    host.acknowledge(dead.isolate(44, 1 << 20))
    assert dead.isolate(2, 1 << 20)
    heir = HugetlbIsolator(kernel, threshold_chunks=1, zeroing=False, clock=lambda: 9e9)
    left = heir.start(lambda: None)
    assert left == kernel.chunks()
    heir.release(left, hinted=False)
    assert Host(kernel, heir).run() == 44
    assert not kernel.pool


def test_chunks_that_the_kernel_refuses_do_not_cause_endless_passes() -> None:
    kernel = ModelKernel(50, zeroing=False)
    kernel.withheld = 10
    _, host = started(kernel)
    assert host.run() == 40
    assert not host.run()
    kernel.withheld = 0
    kernel.allocate(20)
    kernel.release(20)
    assert host.run() >= 20


def test_a_pool_is_not_touched_while_others_use_it() -> None:
    kernel = ModelKernel(50, zeroing=False)
    isolator, host = started(kernel)
    kernel.shared = True
    assert isolator.isolate(512, 1 << 20) == EMPTY
    assert not isolator.idle()
    kernel.shared = False
    assert host.run() == 44


@pytest.mark.parametrize("zeroing", [False, True])
def test_as_much_stays_resident_as_is_held_back_until_it_is_not(zeroing: bool) -> None:
    kernel = ModelKernel(64, zeroing=zeroing)
    isolator = HugetlbIsolator(kernel, threshold_chunks=1, zeroing=zeroing, clock=lambda: 0.0)
    held_pages = 20 * CHUNK_PAGES
    isolator.start(lambda: None, lambda _: HeldPages(held_pages, 0))
    host = Host(kernel, isolator)
    host.run()
    assert len(kernel.resident) == 20
    kernel.allocate(20)
    kernel.release(20)
    host.run()
    assert len(kernel.resident) == 20
    held_pages = 0
    host.run()
    assert len(kernel.resident) <= RESERVE_CHUNKS


@pytest.mark.parametrize("held", [0, 10, 20, 25, 29, 40])
def test_what_is_held_back_causes_no_pass_after_pass(held: int) -> None:
    kernel = ModelKernel(400, zeroing=False, reserve=45)
    kernel.resident = set(range(400))
    isolator = HugetlbIsolator(kernel, threshold_chunks=16, zeroing=False, clock=lambda: 0.0)
    isolator.start(lambda: None, lambda _: HeldPages(held * CHUNK_PAGES, 0))
    host = Host(kernel, isolator)
    host.known_absent = set()
    host.tell_used()
    passes = 0
    while not isolator.idle():
        passes += 1
        assert passes < 5
        while batch := isolator.isolate(64, 1 << 20):
            host.acknowledge(batch)


class PassMachine(RuleBasedStateMachine):
    """Whatever a guest did: after a settle, no more of its free chunks are resident than the
    reserve; with zeroing, than the reserve and the threshold."""

    @initialize(zeroing=st.booleans(), count=st.integers(20, 120))
    def start(self, zeroing: bool, count: int) -> None:
        self.kernel = ModelKernel(count, zeroing=zeroing)
        self.isolator, self.host = started(self.kernel, THRESHOLD_CHUNKS)

    @rule(count=st.integers(1, 60))
    def allocate(self, count: int) -> None:
        self.kernel.allocate(count)

    @rule(count=st.integers(1, 60), first=st.integers(0, 30))
    def free(self, count: int, first: int) -> None:
        self.kernel.release(count, first)

    @rule(at_a_time=st.integers(1, 64))
    def passes(self, at_a_time: int) -> None:
        self.host.run(at_a_time=at_a_time)

    @rule()
    def settle(self) -> None:
        while self.host.run(asked=True):
            pass
        stay = len(self.kernel.resident & set(self.kernel.free))
        assert stay <= RESERVE_CHUNKS + (THRESHOLD_CHUNKS if self.kernel.zeroing else 0)

    @invariant()
    def nothing_stays_isolated(self) -> None:
        assert not hasattr(self, "kernel") or not self.kernel.pool


TestPasses = PassMachine.TestCase
TestPasses.settings = settings(max_examples=80, stateful_step_count=30)


class SlowHost(Host):
    """A host whose acks and reports of refaults come late, and reports also in parts."""

    def __init__(self, kernel: ModelKernel, isolator: HugetlbIsolator) -> None:
        super().__init__(kernel, isolator)
        self.flight: list[RangeSet] = []

    def tell_some_used(self, most: int) -> None:
        used = sorted(self.known_absent & self.kernel.resident)[:most]
        self.known_absent -= set(used)
        self.isolator.refaulted(RangeSet((chunk * CHUNK_PAGES, 1) for chunk in used))

    def poll(self, at_a_time: int) -> None:
        if not self.isolator.idle():
            self.take(at_a_time)

    def take(self, at_a_time: int) -> None:
        while len(self.flight) < 2 and (batch := self.isolator.isolate(at_a_time, 1 << 20)):
            self.flight.append(batch)
        self.isolator.idle()

    def answer(self, at_a_time: int, *, acted: bool) -> None:
        """Acknowledge or skip the oldest batch in flight, if there is one; then take the next."""
        if self.flight:
            batch = self.flight.pop(0)
            if acted:
                self.acknowledge(batch)
            else:
                self.isolator.release(batch, hinted=False)
            self.take(at_a_time)


def test_what_the_host_reports_during_a_pass_is_hinted_by_the_next() -> None:
    kernel = ModelKernel(300, zeroing=True, reserve=22)
    kernel.resident.clear()
    isolator, _ = started(kernel, threshold_chunks=16)
    host = SlowHost(kernel, isolator)
    kernel.allocate(150)
    host.tell_some_used(50)
    kernel.release(150)
    host.poll(32)
    assert host.flight, "50 new chunks are worth a pass"
    host.tell_used()  # the other 100
    while host.flight:
        host.answer(32, acted=True)
    host.run()
    assert len(kernel.resident) <= kernel.reserve + (300 - kernel.reserve) // 8


class SlowPassMachine(RuleBasedStateMachine):
    """Whatever the guest and the host did, even in the middle of passes: once both rest, no more of
    the free chunks are resident than the reserve and what is too few for a pass."""

    @initialize(zeroing=st.booleans(), count=st.integers(60, 200))
    def start(self, zeroing: bool, count: int) -> None:
        self.kernel = ModelKernel(count, zeroing=zeroing)
        self.kernel.growing_takes_s = 0.01
        self.held_chunks = 0
        self.isolator = HugetlbIsolator(
            self.kernel,
            threshold_chunks=THRESHOLD_CHUNKS,
            zeroing=zeroing,
            clock=lambda: self.kernel.now_s,
        )
        self.isolator.start(lambda: None, lambda _: HeldPages(self.held_chunks * CHUNK_PAGES, 0))
        self.host = SlowHost(self.kernel, self.isolator)
        self.host.tell_used()

    @rule(count=st.integers(1, 120))
    def allocate(self, count: int) -> None:
        self.kernel.allocate(count)

    @rule(count=st.integers(1, 120), first=st.integers(0, 30))
    def free(self, count: int, first: int) -> None:
        self.kernel.release(count, first)

    @rule(most=st.integers(1, 100))
    def refaults_are_told(self, most: int) -> None:
        self.host.tell_some_used(most)

    @rule(count=st.integers(30, 120), told=st.integers(0, 60), at_a_time=st.integers(1, 64))
    def use_and_free(self, count: int, told: int, at_a_time: int) -> None:
        """Memory is free again, perhaps before the host has reported all of its use."""
        self.kernel.allocate(count)
        self.host.tell_some_used(told)
        self.kernel.release(count)
        self.kernel.now_s += 1
        self.host.poll(at_a_time)

    @rule(chunks=st.integers(0, 60))
    def hold_back(self, chunks: int) -> None:
        self.held_chunks = chunks

    @rule(seconds=st.sampled_from((0.1, 0.6)), at_a_time=st.integers(1, 64))
    def poll(self, seconds: float, at_a_time: int) -> None:
        self.kernel.now_s += seconds
        self.host.poll(at_a_time)

    @rule(at_a_time=st.integers(1, 64), acted=st.booleans())
    def answer(self, at_a_time: int, acted: bool) -> None:
        self.host.answer(at_a_time, acted=acted)

    @rule(at_a_time=st.integers(1, 64))
    def settle(self, at_a_time: int) -> None:
        self.isolator.report_now(thorough=True)
        self.host.take(at_a_time)

    @rule()
    def rest(self) -> None:
        self.held_chunks = 0
        for _ in range(10):
            self.kernel.now_s += 1
            self.host.tell_used()
            self.host.poll(64)
            while self.host.flight:
                self.host.answer(64, acted=True)
        assert self.isolator.idle(), "passes do not end"
        assert not self.kernel.pool
        stay = len(self.kernel.resident & set(self.kernel.free))
        least = THRESHOLD_CHUNKS
        if self.kernel.zeroing:
            least = max(least, (len(self.kernel.free) - RESERVE_CHUNKS) // 8)
        assert stay <= RESERVE_CHUNKS + least


TestSlowPasses = SlowPassMachine.TestCase
TestSlowPasses.settings = settings(max_examples=80, stateful_step_count=30)


def test_a_pass_for_little_holds_a_small_part_of_the_free_memory() -> None:
    """Its first step takes a sixteenth of the memory, and that has all 20 chunks. The guest can use
    the rest of its free memory during the pass."""
    kernel = ModelKernel(1000, zeroing=False)
    isolator, host = started(kernel)
    host.run()
    kernel.allocate(300)
    kernel.release(20)
    host.tell_used()
    batch = isolator.isolate(512, 1 << 20)
    assert chunks_of(batch) == set(kernel.free + kernel.pool) & kernel.resident
    assert len(kernel.pool) <= 720 // 8
    host.acknowledge(batch)
    assert not host.run(), "nothing is left for another pass"


def test_a_new_agent_hints_only_what_the_host_reports_as_resident() -> None:
    """Otherwise a restarted agent would isolate all free memory, also where little is free."""
    kernel = ModelKernel(1000, zeroing=False)
    kernel.allocate(300)
    kernel.release(20)
    kernel.resident = set(kernel.used) | set(kernel.free[-20:])
    isolator = HugetlbIsolator(kernel, threshold_chunks=1, zeroing=False, clock=lambda: 0.0)
    isolator.start(lambda: None)
    isolator.report_now(thorough=False)
    assert isolator.isolate(512, 1 << 20) == EMPTY, "it does not know yet what is resident"
    assert isolator.idle()
    host = Host(kernel, isolator)
    host.tell_used()
    batch = isolator.isolate(512, 1 << 20)
    assert chunks_of(batch) == set(kernel.pool) & kernel.resident
    assert len(kernel.pool) <= 720 // 16
    host.acknowledge(batch)
    assert not host.run()
    assert not host.hinted_absent


def test_a_pass_holds_more_only_when_the_host_has_answered() -> None:
    kernel = ModelKernel(1000, zeroing=False)
    isolator, host = started(kernel)
    held = []
    while batch := isolator.isolate(1000, 1 << 20):
        held.append(len(kernel.pool))
        assert not isolator.isolate(1000, 1 << 20), "not before the ack"
        host.acknowledge(batch)
    assert held[0] <= 1000 // 16 + 1
    assert all(now <= 3 * before for before, now in pairwise(held))
    assert held[-1] == 1000 - RESERVE_CHUNKS


def test_chunks_that_were_not_freed_last_are_found_too() -> None:
    kernel = ModelKernel(1000, zeroing=False)
    isolator, host = started(kernel)
    host.run()
    kernel.allocate(300)
    isolator.idle()
    kernel.free = kernel.used[:50] + kernel.free  # the kernel allocates from the end
    del kernel.used[:50]
    assert host.run() == 50 - RESERVE_CHUNKS, "the reserve is at the end of the kernel's free list"
    assert not host.run()


def test_no_pass_begins_while_the_guest_allocates() -> None:
    kernel = ModelKernel(100, zeroing=False, reserve=8)
    isolator, host = started(kernel)
    kernel.allocate(60)
    for _ in range(10):
        isolator.idle()
        kernel.allocate(3)
        assert isolator.idle()
        assert not isolator.isolate(512, 1 << 20)
    kernel.release(50)
    assert host.run() == 52
    kernel.allocate(50)
    kernel.release(20)
    isolator.idle()
    kernel.allocate(3)
    assert host.run(asked=True) == 17, "a pass that is asked for begins"


def test_a_pass_ends_with_the_acks_in_flight_if_the_guest_needs_memory() -> None:
    kernel = ModelKernel(100, zeroing=False, reserve=8)
    isolator, host = started(kernel)
    for _ in range(3):
        host.acknowledge(isolator.isolate(100, 1 << 20))
    flight = [isolator.isolate(10, 1 << 20) for _ in range(2)]
    kernel.allocate(7)
    assert not isolator.isolate(10, 1 << 20)
    host.acknowledge(flight.pop())
    assert not isolator.isolate(10, 1 << 20)
    assert kernel.pool, "a batch is in flight"
    host.acknowledge(flight.pop())
    assert not isolator.isolate(10, 1 << 20)
    assert not kernel.pool
    kernel.release(7)
    assert host.run() >= 100 - 8 - 42 - 20, "what it had to leave is hinted later"


def test_a_pass_is_followed_by_a_rest() -> None:
    """In real guests, passes without a rest in between slowed the workload by a factor of 4."""
    kernel = ModelKernel(100, zeroing=False)
    isolator, host = started(kernel)
    kernel.growing_takes_s = 0.025
    kernel.allocate(40)
    kernel.release(20)
    assert host.run() > 0
    kernel.release(20)
    host.tell_used()
    assert isolator.idle(), "it rests"
    kernel.now_s += 0.35
    assert isolator.idle()
    kernel.now_s += 0.1
    assert not isolator.idle()


def test_a_pass_that_is_asked_for_does_not_wait() -> None:
    kernel = ModelKernel(100, zeroing=False)
    _, host = started(kernel)
    kernel.growing_takes_s = 0.5
    kernel.allocate(40)
    kernel.release(20)
    assert host.run() > 0
    kernel.release(20)
    assert host.run(asked=True) == 20

"""The hinting core keeps invariant I1 (ARCHITECTURE.md) in random sequences of events. Also
settles, allowances, and batches that are hinted again."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from guest_agent.hinting import (
    HintingCore,
    Instruction,
    Isolate,
    Limits,
    ProtocolViolation,
    Release,
    ReportNow,
    Send,
    SendSettled,
    State,
)
from hintfleet.ranges import EMPTY, RangeSet

LIMITS = Limits(ranges_per_batch=4, pages_per_batch=2048, batches_in_flight=2)


class CoreMachine(RuleBasedStateMachine):
    """A guest with up to 128 chunks. In any order, it frees chunks, the host welcomes it or
    acknowledges a batch, a period passes, and the link is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.core = HintingCore(RangeSet([(0, 512)]))
        self.isolated = [RangeSet([(0, 512)])]
        self.fenced_before_welcome = True
        self.free = [RangeSet([(n << 9, 512)]) for n in range(1, 64)]
        self.unacked: dict[int, RangeSet] = {}
        self.may_release: list[RangeSet] = []
        self.epoch = 0
        self.settled: list[SendSettled] = []

    def carry_out(self, instructions: list[Instruction]) -> None:
        for one in instructions:
            match one:
                case Isolate(max_ranges, max_pages):
                    assert (max_ranges, max_pages) == (4, 2048)
                    chunk = self.free.pop() if self.free else EMPTY
                    if chunk:
                        self.isolated.append(chunk)
                    self.carry_out(list(self.core.isolated(chunk, isolator_idle=not chunk)))
                case Send(epoch, seq, ranges):
                    assert epoch == self.epoch
                    assert ranges in self.isolated
                    self.unacked[seq] = ranges
                case Release(ranges, _):
                    assert ranges in self.may_release, "released before its ack or a welcome"
                    self.may_release.remove(ranges)
                    self.isolated.remove(ranges)
                case SendSettled():
                    self.settled.append(one)
                case ReportNow():
                    pass

    @rule()
    def welcome(self) -> None:
        self.epoch += 1
        self.may_release = list(self.isolated)
        self.unacked.clear()
        self.carry_out(list(self.core.welcomed(self.epoch, LIMITS)))
        assert not self.may_release, "a welcome releases all that was isolated before it"

    @precondition(lambda self: self.unacked and self.core.state is State.OPEN)
    @rule(newest=st.booleans())
    def ack(self, newest: bool) -> None:
        seq = (max if newest else min)(self.unacked)
        self.may_release = [self.unacked.pop(seq)]
        self.carry_out(list(self.core.acknowledged(self.epoch, seq, acted=True)))
        assert not self.may_release

    @precondition(lambda self: self.epoch > 0)
    @rule(seq=st.integers(1, 99))
    def ack_of_an_earlier_epoch_changes_nothing(self, seq: int) -> None:
        assert not self.core.acknowledged(self.epoch - 1, seq, acted=True)

    @rule()
    def lose_link(self) -> None:
        self.carry_out(list(self.core.lost()))
        self.unacked.clear()

    @rule(chunk=st.integers(64, 127))
    def guest_frees(self, chunk: int) -> None:
        ranges = RangeSet([(chunk << 9, 512)])
        if ranges not in self.free and ranges not in self.isolated:
            self.free.append(ranges)
        self.carry_out(list(self.core.ready()))

    @rule()
    def tick(self) -> None:
        self.carry_out(list(self.core.period_passed(isolator_idle=not self.free)))

    @invariant()
    def in_flight_is_bounded(self) -> None:
        assert len(self.unacked) <= LIMITS.batches_in_flight

    @invariant()
    def hello_would_say_all_that_is_isolated(self) -> None:
        assert self.core.still_isolated == RangeSet(r for rs in self.isolated for r in rs)


TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=100, stateful_step_count=40)


def opened() -> HintingCore:
    core = HintingCore()
    assert list(core.welcomed(1, LIMITS)) == [ReportNow(), Isolate(4, 2048)]
    return core


def test_an_ack_for_nothing_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="batch 7"):
        opened().acknowledged(1, 7, acted=True)


def test_nothing_is_isolated_before_welcome() -> None:
    core = HintingCore()
    assert not core.ready()
    assert not core.period_passed(isolator_idle=False)


def test_settled_comes_after_a_pass_that_gave_nothing_and_the_last_ack() -> None:
    core = opened()
    chunk = RangeSet([(512, 512)])
    core.settle_requested(9)
    assert next(iter(core.isolated(chunk, isolator_idle=True))) == Send(1, 1, chunk)
    assert not core.isolated(EMPTY, isolator_idle=True), "a batch is still in flight"
    core.acknowledged(1, 1, acted=True)
    again = core.isolated(EMPTY, isolator_idle=True)
    assert again == [ReportNow(thorough=True), Isolate(4, 2048)], (
        "the pass gave chunks, so another one must follow"
    )
    settled = core.isolated(EMPTY, isolator_idle=True)
    assert settled == [SendSettled(request_id=9, batches=1, hinted_pages=512)]


def test_settle_waits_for_an_isolator_that_is_still_working() -> None:
    core = opened()
    core.settle_requested(3)
    assert not core.isolated(EMPTY, isolator_idle=False)
    assert core.settling
    assert core.period_passed(isolator_idle=True)[0] == SendSettled(
        request_id=3, batches=0, hinted_pages=0
    )


def test_each_of_two_settle_requests_at_once_is_answered() -> None:
    core = opened()
    first, second = RangeSet([(512, 512)]), RangeSet([(1024, 512)])
    core.settle_requested(1)
    core.isolated(first, isolator_idle=True)
    core.settle_requested(2)
    core.isolated(second, isolator_idle=True)
    for seq in (1, 2):
        core.acknowledged(1, seq, acted=True)
    assert core.isolated(EMPTY, isolator_idle=True)[0] == ReportNow(thorough=True)
    assert core.isolated(EMPTY, isolator_idle=True) == [
        SendSettled(request_id=1, batches=2, hinted_pages=1024),
        SendSettled(request_id=2, batches=1, hinted_pages=512),
    ]
    assert not core.settling


@pytest.mark.parametrize("forbid", [lambda core: core.allowed(0), lambda core: core.stop()])
def test_nothing_is_isolated_while_nothing_may_be_hinted(
    forbid: Callable[[HintingCore], object],
) -> None:
    """If the core still asked for chunks, the kernel module would isolate a batch that is not read,
    and a settle would never end."""
    core = opened()
    chunk = RangeSet([(512, 512)])
    core.isolated(chunk, isolator_idle=False)
    forbid(core)
    assert not core.ready()
    assert not core.period_passed(isolator_idle=False)
    assert not core.settle_requested(4)
    assert not core.period_passed(isolator_idle=False), "a batch is in flight"
    assert list(core.acknowledged(1, 1, acted=True)) == [Release(chunk, hinted=True)]
    assert list(core.period_passed(isolator_idle=False)) == [
        SendSettled(request_id=4, batches=0, hinted_pages=0)
    ]
    core.lost()
    assert not core.welcomed(2, LIMITS)


def test_the_rest_of_a_batch_is_hinted_beyond_the_allowance() -> None:
    """If a batch of the kernel module were returned half hinted, the module would show the same
    chunks again and again."""
    core = opened()
    core.allowed(512)
    first, rest = RangeSet([(512, 512)]), RangeSet([(1024, 512)])
    more = core.isolated(first, isolator_idle=True, unfinished=True)
    assert list(more) == [Send(1, 1, first), Isolate(4, 2048)]
    core.stop()
    assert list(core.isolated(rest, isolator_idle=True)) == [Send(1, 2, rest)]
    assert list(core.acknowledged(1, 1, acted=True)) == [Release(first, hinted=True)]
    assert list(core.acknowledged(1, 2, acted=True)) == [Release(rest, hinted=True)]


def test_a_new_allowance_starts_isolation_again() -> None:
    core = opened()
    core.allowed(0)
    assert list(core.allowed(512)) == [Isolate(4, 512)]
    assert list(core.period_passed(isolator_idle=False)) == [ReportNow(), Isolate(4, 512)]


def test_batches_in_flight_count_for_a_new_allowance() -> None:
    """The host repeats what it wants until the memory is back. If batches in flight did not count,
    a slow guest would give back several times as much."""
    core = opened()
    core.allowed(1024)
    core.isolated(RangeSet([(512, 512)]), isolator_idle=True)
    assert list(core.allowed(1024)) == [Isolate(4, 512)]
    core.isolated(RangeSet([(1024, 512)]), isolator_idle=True)
    assert list(core.allowed(1024)) == []
    core.acknowledged(1, 1, acted=True)
    assert list(core.allowed(512)) == [], "the other batch gives it"


@pytest.mark.parametrize("acted", [True, False])
def test_a_batch_that_the_host_skipped_for_now_is_hinted_again(acted: bool) -> None:
    """Otherwise the memory of a batch that came too late would stay resident until the guest has
    used and freed it again."""
    core = opened()
    chunk = RangeSet([(512, 512)])
    core.isolated(chunk, isolator_idle=True)
    assert core.acknowledged(1, 1, acted=acted)[0] == Release(chunk, hinted=acted)


def test_batches_in_flight_when_the_link_broke_are_hinted_again() -> None:
    core = opened()
    chunk = RangeSet([(512, 512)])
    core.isolated(chunk, isolator_idle=True)
    core.lost()
    assert core.welcomed(2, LIMITS)[0] == Release(chunk, hinted=False)

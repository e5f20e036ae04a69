"""Which session is welcome and which batches may run: epochs, sequence, age, limits."""

from __future__ import annotations

import pytest

from hintfleet.errors import GuestLost, InvalidInput, TransientError
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.page_map import PageMap
from host_agent.memory.reclaim import Outcome, skip
from host_agent.session.gate import (
    LIMITS,
    OLDEST_BATCH_S,
    Acknowledge,
    Batch,
    EndSession,
    Epochs,
    Gate,
    Instruction,
    Post,
    Run,
    State,
    TakeTurn,
    Welcome,
)

SOME = RangeSet([(512, 512)])
DONE = Outcome(reclaimed=PageMap(SOME))


def batch(seq: int, epoch: int = 5, ranges: RangeSet = SOME) -> Batch:
    return Batch(epoch=epoch, seq=seq, ranges=ranges, received_s=0.0)


def skipped(one: Batch, reason: pb.SkipReason.ValueType) -> Post:
    return Post(one, skip(one.ranges, reason))


def ended(instructions: list[Instruction]) -> dict[int, type[Exception]]:
    return {i.session: type(i.error) for i in instructions if isinstance(i, EndSession)}


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    assert gate.connected(5) == [Welcome(5)]
    return gate


@pytest.fixture
def running(gate: Gate) -> Gate:
    """Return a gate in which batch 1 of session 5 runs, and batch 2 waits."""
    assert gate.arrived(5, batch(1)) == [TakeTurn()]
    assert gate.turn_came(0.0) == [Run(batch(1))]
    assert gate.arrived(5, batch(2)) == []
    return gate


def test_batches_run_one_after_the_other_and_are_acknowledged(running: Gate) -> None:
    assert running.finished(batch(1), DONE) == [
        Post(batch(1), DONE),
        Acknowledge(5, batch(1), DONE),
        TakeTurn(),
    ]
    assert running.turn_came(0.0) == [Run(batch(2))]
    assert running.finished(batch(2), DONE)[-1] == Acknowledge(5, batch(2), DONE)


@pytest.mark.parametrize("seq", [0, 2])
def test_out_of_sequence_is_a_violation(gate: Gate, seq: int) -> None:
    with pytest.raises(InvalidInput, match="1 was due"):
        gate.arrived(5, batch(seq))
    assert gate.arrived(5, batch(1)) == [TakeTurn()]


def test_a_repeated_batch_is_a_violation(gate: Gate) -> None:
    gate.arrived(5, batch(1))
    with pytest.raises(InvalidInput, match="2 was due"):
        gate.arrived(5, batch(1))


def test_empty_and_oversized_batches_are_violations(gate: Gate) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        gate.arrived(5, batch(1, ranges=EMPTY))
    with pytest.raises(InvalidInput, match="limit"):
        gate.arrived(5, batch(1, ranges=RangeSet([(0, LIMITS.pages_per_batch + 1)])))


def test_more_than_may_be_in_flight_is_a_violation(running: Gate) -> None:
    with pytest.raises(InvalidInput, match="more than 2"):
        running.arrived(5, batch(3))


def test_a_batch_before_the_welcome_is_a_violation(running: Gate) -> None:
    running.connected(6)
    with pytest.raises(InvalidInput, match="before the welcome"):
        running.arrived(6, batch(1, epoch=6))


def test_a_batch_that_names_another_epoch_is_skipped_in_its_turn(gate: Gate) -> None:
    gate.arrived(5, batch(1))
    gate.arrived(5, batch(9, epoch=4))
    gate.turn_came(0.0)
    assert gate.finished(batch(1), DONE)[-1] == TakeTurn()
    late = batch(9, epoch=4)
    reason = skip(SOME, pb.WRONG_EPOCH)
    assert gate.turn_came(0.0) == [Post(late, reason), Acknowledge(5, late, reason)]
    assert gate.running is None
    gate.arrived(5, batch(2))
    assert gate.turn_came(0.0) == [Run(batch(2))]


def test_a_batch_that_waited_too_long_is_stale(running: Gate) -> None:
    running.finished(batch(1), DONE)
    assert running.turn_came(OLDEST_BATCH_S) == [Run(batch(2))]
    running.finished(batch(2), DONE)
    running.arrived(5, batch(3))
    assert running.turn_came(OLDEST_BATCH_S + 0.001)[0] == skipped(batch(3), pb.STALE)
    assert running.running is None


def test_a_running_batch_delays_the_welcome(running: Gate) -> None:
    """I2: its punch cannot be cancelled, and a Welcome would let the guest use the memory that is
    being punched."""
    instructions = list(running.connected(6))
    assert skipped(batch(2), pb.WRONG_EPOCH) in instructions, "the waiting batch never runs"
    assert ended(instructions) == {5: TransientError}
    assert Welcome(6) not in instructions
    assert running.finished(batch(1), DONE) == [Post(batch(1), DONE), Welcome(6)]


def test_only_the_newest_session_that_waits_for_a_running_batch_is_welcomed(running: Gate) -> None:
    running.connected(6)
    assert ended(list(running.connected(7))) == {6: TransientError}
    assert running.finished(batch(1), DONE)[-1] == Welcome(7)
    assert running.epoch == 7


def test_a_session_that_ends_while_it_waits_is_not_welcomed(running: Gate) -> None:
    running.connected(6)
    running.left(6)
    assert running.finished(batch(1), DONE) == [Post(batch(1), DONE)]
    assert running.state is State.CLOSED


def test_a_turn_that_comes_after_its_epoch_runs_nothing(gate: Gate) -> None:
    gate.arrived(5, batch(1))
    assert gate.connected(6)[0] == skipped(batch(1), pb.WRONG_EPOCH)
    assert gate.turn_came(0.0) == []


def test_nothing_runs_between_sessions(running: Gate) -> None:
    assert running.left(5) == [skipped(batch(2), pb.WRONG_EPOCH)]
    assert running.finished(batch(1), DONE) == [Post(batch(1), DONE)]
    assert running.turn_came(0.0) == []


def test_the_end_of_a_superseded_session_changes_nothing(gate: Gate) -> None:
    gate.connected(6)
    assert gate.left(5) == []
    assert gate.arrived(6, batch(1, epoch=6)) == [TakeTurn()]


def test_batches_of_a_superseded_session_never_run(gate: Gate) -> None:
    """They do not run even if they name the epoch that is open now."""
    gate.connected(6)
    told = batch(1, epoch=6)
    assert gate.arrived(5, told) == [skipped(told, pb.WRONG_EPOCH)]
    assert gate.turn_came(0.0) == []
    assert gate.arrived(6, told) == [TakeTurn()], "they do not use up a sequence number"


def test_batches_of_a_superseded_session_are_bounded(gate: Gate) -> None:
    """Skipped batches enter the books, too: 4096 of them with 2**40 pages each would be 2**64
    bytes, more than a counter of 64 bits holds."""
    gate.connected(6)
    for ranges in (EMPTY, RangeSet([(0, LIMITS.pages_per_batch + 1)])):
        with pytest.raises(InvalidInput):
            gate.arrived(5, batch(1, ranges=ranges))


def test_batches_of_an_earlier_boot_are_skipped(running: Gate) -> None:
    """A guest that boots again sends a Hello, and each Hello ends the epoch before."""
    assert skipped(batch(2), pb.WRONG_EPOCH) in running.connected(6)
    assert running.finished(batch(1), DONE)[-1] == Welcome(6)


def test_a_guest_that_is_gone_stays_gone(running: Gate) -> None:
    instructions = list(running.gone(GuestLost("reset")))
    assert skipped(batch(2), pb.GUEST_GONE) in instructions
    assert ended(instructions) == {5: GuestLost}
    assert running.finished(batch(1), DONE) == [Post(batch(1), DONE)]
    assert ended(list(running.connected(6))) == {6: GuestLost}
    assert running.left(6) == []
    assert running.turn_came(0.0) == []
    assert running.state is State.GONE
    assert running.gone(GuestLost("again")) == []


def test_epochs_grow_also_over_a_restart() -> None:
    first = Epochs()
    seen = [first.next() for _ in range(1000)]
    assert seen == sorted(set(seen))
    assert Epochs().next() > seen[-1] - 1000

"""Which batches may run: epochs, sequence, age, limits."""

import pytest

from hintfleet.errors import InvalidInput
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.gate import LIMITS, OLDEST_BATCH_S, Epochs, Gate

SOME = RangeSet([(512, 512)])


def batch(seq: int, epoch: int = 5) -> pb.Batch:
    return pb.Batch(epoch=epoch, seq=seq)


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    gate.open(5)
    return gate


def test_batches_in_order_run(gate: Gate) -> None:
    for seq in (1, 2, 3):
        gate.check(batch(seq), SOME)
        assert gate.admit(5, 0.0) is None


@pytest.mark.parametrize("seq", [0, 2])
def test_out_of_sequence_is_a_violation(gate: Gate, seq: int) -> None:
    with pytest.raises(InvalidInput, match="1 was due"):
        gate.check(batch(seq), SOME)
    gate.check(batch(1), SOME)


def test_a_repeated_batch_is_a_violation(gate: Gate) -> None:
    gate.check(batch(1), SOME)
    with pytest.raises(InvalidInput, match="2 was due"):
        gate.check(batch(1), SOME)


def test_empty_and_oversized_batches_are_violations(gate: Gate) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        gate.check(batch(1), EMPTY)
    with pytest.raises(InvalidInput, match="limit"):
        gate.check(batch(1), RangeSet([(0, LIMITS.pages_per_batch + 1)]))


def test_a_batch_of_an_earlier_epoch_is_skipped_not_a_violation(gate: Gate) -> None:
    gate.open(6)
    gate.check(batch(9, epoch=5), SOME)
    assert gate.admit(5, 0.0) == pb.WRONG_EPOCH
    gate.check(batch(1, epoch=6), SOME)
    assert gate.admit(6, 0.0) is None


def test_nothing_runs_between_epochs(gate: Gate) -> None:
    gate.close()
    assert gate.admit(5, 0.0) == pb.WRONG_EPOCH


def test_a_batch_that_waited_too_long_is_stale(gate: Gate) -> None:
    assert gate.admit(5, OLDEST_BATCH_S) is None
    assert gate.admit(5, OLDEST_BATCH_S + 0.001) == pb.STALE


def test_a_guest_that_is_gone_stays_gone(gate: Gate) -> None:
    gate.gone()
    gate.open(6)
    assert gate.admit(6, 0.0) == pb.GUEST_GONE
    gate.close()
    assert gate.admit(6, 0.0) == pb.GUEST_GONE


def test_epochs_grow_also_over_a_restart() -> None:
    first = Epochs()
    seen = [first.next() for _ in range(1000)]
    assert seen == sorted(set(seen))
    assert Epochs().next() > seen[-1] - 1000

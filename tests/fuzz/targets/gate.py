"""The gate keeps its guarantees in any order of new and ended sessions, batches, turns and the loss
of the guest.

The oracle is not another gate but the guarantees themselves: I2, one batch at a time, each accepted
batch posted once, each ack right after its post and to the newest session, in the order in which
the batches arrived, and the batches of an epoch in sequence.
"""

from __future__ import annotations

from collections import defaultdict

from hintfleet.errors import GuestLost, InvalidInput
from hintfleet.ranges import EMPTY, RangeSet
from host_agent.memory.page_map import PageMap
from host_agent.memory.reclaim import Outcome, skip
from host_agent.session import gate
from tests.fuzz.source import Source
from tests.fuzz.target import Target

_RANGES = (
    RangeSet([(512, 512)]),
    EMPTY,
    RangeSet([(0, gate.LIMITS.pages_per_batch)]),
    RangeSet([(0, gate.LIMITS.pages_per_batch + 1)]),
)


class _Guest:
    """Carries out the gate's instructions, as host_agent/session/guest_sessions.py does, and checks
    them."""

    def __init__(self) -> None:
        self.gate = gate.Gate()
        self.now_s = 0.0
        self.sessions: list[int] = []
        self.gone = False
        self._left: set[int] = set()
        self._ended: set[int] = set()
        self._welcomed: set[int] = set()
        self._running: gate.Batch | None = None
        self._turn_asked = False
        self._arrived: list[tuple[int, gate.Batch]] = []
        self._posted: list[gate.Batch] = []
        self._acknowledged: defaultdict[int, list[gate.Batch]] = defaultdict(list)

    def connect(self) -> None:
        self.sessions.append(len(self.sessions) + 1)
        self._carry_out(self.gate.connected(self.sessions[-1]))

    def leave(self, session: int) -> None:
        self._left.add(session)
        self._carry_out(self.gate.left(session))

    def lose(self) -> None:
        self._carry_out(self.gate.gone(GuestLost("reset")))
        self.gone = True

    def send(self, session: int, epoch: int, seq: int, ranges: RangeSet) -> None:
        if session in self._left:
            return
        batch = gate.Batch(epoch=epoch, seq=seq, ranges=ranges, received_s=self.now_s)
        self._arrived.append((session, batch))
        try:
            instructions = self.gate.arrived(session, batch)
        except InvalidInput:
            self._arrived.pop()
            self.leave(session)
            return
        self._carry_out(instructions)

    def take_turn(self) -> None:
        if self._turn_asked and self._running is None:
            self._turn_asked = False
            self._carry_out(self.gate.turn_came(self.now_s))

    def finish(self) -> None:
        if (batch := self._running) is not None:
            self._running = None
            self._carry_out(self.gate.finished(batch, Outcome(reclaimed=PageMap(batch.ranges))))

    def drain(self) -> None:
        """Let all turns come; then check that each batch that the gate accepted was posted once."""
        while self._turn_asked or self._running is not None:
            self.take_turn()
            self.finish()
        assert sorted(map(id, self._posted)) == sorted(id(b) for _, b in self._arrived)

    def _carry_out(self, instructions: object) -> None:
        assert isinstance(instructions, list | tuple)
        for instruction in instructions:
            self._carry_out_one(instruction)

    def _carry_out_one(self, instruction: gate.Instruction) -> None:
        match instruction:
            case gate.Welcome(session):
                assert self._running is None, "I2"
                assert not self.gone
                assert session == self.sessions[-1] not in self._left | self._welcomed
                self._welcomed.add(session)
            case gate.EndSession(session, _):
                assert session not in self._left | self._ended
                self._ended.add(session)
            case gate.TakeTurn():
                assert not self._turn_asked
                self._turn_asked = True
            case gate.Run(batch):
                self._check_run(batch)
                self._running = batch
            case gate.Post(batch, outcome):
                assert outcome == Outcome(reclaimed=PageMap(batch.ranges)) or outcome == skip(
                    batch.ranges, next(iter(outcome.skipped))
                )
                assert 0 < batch.ranges.page_count <= gate.LIMITS.pages_per_batch
                self._posted.append(batch)
            case gate.Acknowledge(session, batch, _):
                self._check_order(session, batch)
                assert session == self.sessions[-1] not in self._left | self._ended
                assert batch is self._posted[-1], "acknowledged before it was in the books"

    def _check_order(self, session: int, batch: gate.Batch) -> None:
        """Check that this ack is for the session's next batch, and that the acknowledged batches of
        its epoch are numbered from 1."""
        acknowledged = self._acknowledged[session]
        arrived = [b for s, b in self._arrived if s == session]
        assert batch is arrived[len(acknowledged)]
        acknowledged.append(batch)
        numbers = [b.seq for b in acknowledged if b.epoch == session]
        assert numbers == list(range(1, len(numbers) + 1))

    def _check_run(self, batch: gate.Batch) -> None:
        """Check that the batch may run: it is of the welcomed session, not too old or too large,
        not posted before, and no other batch runs."""
        assert self._running is None
        assert not self.gone
        (session,) = {s for s, b in self._arrived if b is batch}
        assert batch.epoch == session == self.sessions[-1]
        assert session in self._welcomed - self._left - self._ended
        assert self.now_s - batch.received_s <= gate.OLDEST_BATCH_S
        assert 0 < batch.ranges.page_count <= gate.LIMITS.pages_per_batch
        assert not any(b is batch for b in self._posted)


def try_input(data: bytes) -> None:
    source = Source(data)
    guest = _Guest()
    due = 1
    while source.more:
        step = source.number()
        argument = step >> 3
        session = guest.sessions[-1 - argument % 2 % len(guest.sessions)] if guest.sessions else 0
        match step & 7:
            case 0:
                guest.connect()
                due = 1
            case 1 if session:
                guest.leave(session)
            case 2 if argument == 0:
                guest.lose()
            case 3 | 4 if session:
                guest.send(session, session, due, _RANGES[0])
                due += 1
            case 5 if session:
                epoch, seq = source.choice((session, 1, 1 << 63)), source.choice((due, 0, 1 << 63))
                guest.send(session, epoch, seq, _RANGES[argument % len(_RANGES)])
            case 6:
                guest.take_turn()
            case 7:
                guest.finish()
                guest.now_s += argument / 64
    guest.drain()
    assert guest.gate.state is not gate.State.OPEN or not guest.gone


TARGET = Target.of(
    try_input,
    seeds=(bytes([0, 3, 6, 3, 7, 6, 7]), bytes([0, 3, 6, 8, 3, 7, 6, 7, 1, 0, 3, 6, 2])),
    max_bytes=128,
    quick_runs=10_000,
)

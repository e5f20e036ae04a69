"""The gate: events in, instructions out.

Which session of a guest is welcome, and which of its batches may run. This is the
host's side of the session protocol (hinting.proto) as a pure state machine;
`host_agent.guest` carries out its instructions. It knows no socket, clock or lock. The
guest's side is guest_agent/hinting.py.

It keeps invariant I2: `Welcome` is instructed only while nothing is `running`, and what
waited for an earlier epoch was skipped when that epoch ended. A punch cannot be called
back, so one that runs holds the Welcome up, whatever else happens in between.

It speaks for one process. That a predecessor which was killed is really gone, the system
call that it was in included, must be certain before the first `connected`: whoever
adopts guests holds a lock that the kernel lets go of only then (flock(2)).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hintfleet.errors import HintfleetError, InvalidInput, TransientError
from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.reclaim import Outcome, skip

LIMITS = pb.Limits(ranges_per_batch=128, pages_per_batch=1 << 20, batches_in_flight=2)
"""A batch is at most 4 GiB in 128 ranges; two may wait for their acks. What is handled in one
go is what other guests may have to wait for, so a full batch costs well under a millisecond
besides its punches."""

OLDEST_BATCH_S = 0.25
"""A batch that waited longer is skipped: its guest may have been reset meanwhile,
and the news of it be on its way."""


class State(Enum):
    """Whether batches are welcome."""

    CLOSED = "closed"
    """No session, or one that is not welcomed yet."""
    OPEN = "open"
    GONE = "gone"
    """The guest was reset, stopped or destroyed; final."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it arrived.

    :ivar epoch: what it says it belongs to.
    :ivar received_s: when it arrived, on the clock of `Gate.turn_came`.
    :ivar wire_bytes: size of its packed ranges.
    """

    epoch: int
    seq: int
    ranges: RangeSet
    received_s: float
    wire_bytes: int = 0


@dataclass(frozen=True)
class Welcome:
    """Tell a session that its epoch has begun."""

    session: int


@dataclass(frozen=True)
class EndSession:
    """End a session's stream with this error."""

    session: int
    error: HintfleetError


@dataclass(frozen=True)
class TakeTurn:
    """Get hold of the guest's RAM, then tell `Gate.turn_came`, and let go after its `Run`."""


@dataclass(frozen=True)
class Run:
    """Reclaim this batch, then tell `Gate.finished`, whatever comes of it."""

    batch: Batch


@dataclass(frozen=True)
class Post:
    """Enter what became of a batch into the books: once for each that arrived."""

    batch: Batch
    outcome: Outcome


@dataclass(frozen=True)
class Acknowledge:
    """Tell a session what became of its batch."""

    session: int
    batch: Batch
    outcome: Outcome


Instruction = Welcome | EndSession | TakeTurn | Run | Post | Acknowledge


class Gate:
    """One guest's sessions and batches, from its first Hello until it is gone.

    A session is named by the epoch that it gets if it is welcomed. Every method but
    `arrived` takes any event at any time; one that is of no concern any more (a session
    that was superseded leaves) returns nothing.
    """

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.epoch = 0
        """Of the session that was welcomed last."""
        self.running: Batch | None = None
        """What a `Run` is carried out for; it may be of an epoch that is over."""
        self._session: int | None = None
        self._waiting: deque[Batch] = deque()
        self._next_seq = 1
        self._asked_for_turn = False
        self._gone: HintfleetError | None = None

    def connected(self, session: int) -> Sequence[Instruction]:
        """A stream said Hello: the newest wins, and the epoch of the one before is over.

        :param session: a number larger than that of all sessions before.
        """
        if self._gone is not None:
            return [EndSession(session, self._gone)]
        superseded = self._end_session(TransientError("another agent of this guest has connected"))
        self._session = session
        return [*superseded, *self._welcome()]

    def left(self, session: int) -> Sequence[Instruction]:
        """A stream has ended; if it was the newest, nothing runs until the next one."""
        if session != self._session:
            return []
        self._session = None
        return self._close(pb.WRONG_EPOCH)

    def gone(self, error: HintfleetError) -> Sequence[Instruction]:
        """The guest is no more: nothing runs ever again, and every session ends with `error`."""
        if self._gone is not None:
            return []
        self._gone = error
        ended = self._end_session(error, pb.GUEST_GONE)
        self.state = State.GONE
        return ended

    def arrived(self, session: int, batch: Batch) -> Sequence[Instruction]:
        """A batch came on a session.

        :raises InvalidInput: before the Welcome, out of sequence, empty, or beyond the
            limits. The caller ends the session; nothing of the batch was touched.
        """
        _check_size(batch)
        if session != self._session:  # superseded, and read on for a moment
            return [Post(batch, skip(batch.ranges, pb.WRONG_EPOCH))]
        self._check(batch)
        self._next_seq += batch.epoch == self.epoch
        self._waiting.append(batch)
        return self._ask_for_turn()

    def turn_came(self, now_s: float) -> Sequence[Instruction]:
        """The guest's RAM is ours to change: run what waits longest, unless it is too late."""
        self._asked_for_turn = False
        instructions: list[Instruction] = []
        while self._waiting:
            batch = self._waiting.popleft()
            reason = self._why_skip(batch, now_s)
            if reason is None:
                self.running = batch
                return [*instructions, Run(batch)]
            instructions += self._done(batch, skip(batch.ranges, reason))
        return instructions

    def finished(self, batch: Batch, outcome: Outcome) -> Sequence[Instruction]:
        """The batch that was running is over; a session that waited for that is welcomed."""
        self.running = None
        return [*self._done(batch, outcome), *self._welcome(), *self._ask_for_turn()]

    def _check(self, batch: Batch) -> None:
        """Hold an arriving batch against the protocol."""
        if self.state is not State.OPEN:
            raise InvalidInput(f"batch {batch.seq} came before the welcome")
        if len(self._waiting) + (self.running is not None) >= LIMITS.batches_in_flight:
            raise InvalidInput(f"more than {LIMITS.batches_in_flight} batches in flight")
        if batch.epoch == self.epoch and batch.seq != self._next_seq:
            raise InvalidInput(f"batch {batch.seq} came where {self._next_seq} was due")

    def _why_skip(self, batch: Batch, now_s: float) -> pb.SkipReason.ValueType | None:
        """Why a batch of the open session must not run; None if it may."""
        if batch.epoch != self.epoch:
            return pb.WRONG_EPOCH
        if now_s - batch.received_s > OLDEST_BATCH_S:
            return pb.STALE
        return None

    def _welcome(self) -> Sequence[Instruction]:
        """Open the newest session's epoch, if no batch of an earlier one is running (I2)."""
        if self.state is not State.CLOSED or self._session is None or self.running is not None:
            return []
        self.state, self.epoch, self._next_seq = State.OPEN, self._session, 1
        return [Welcome(self.epoch)]

    def _end_session(
        self, error: HintfleetError, reason: pb.SkipReason.ValueType = pb.WRONG_EPOCH
    ) -> Sequence[Instruction]:
        session, self._session = self._session, None
        ended = [] if session is None else [EndSession(session, error)]
        return [*self._close(reason), *ended]

    def _close(self, reason: pb.SkipReason.ValueType) -> Sequence[Instruction]:
        """End the epoch: what waits will never run (I2)."""
        if self.state is State.OPEN:
            self.state = State.CLOSED
        waiting, self._waiting = self._waiting, deque()
        return [Post(batch, skip(batch.ranges, reason)) for batch in waiting]

    def _done(self, batch: Batch, outcome: Outcome) -> Sequence[Instruction]:
        post = Post(batch, outcome)
        # After its session's end nobody waits for the ack: the next Welcome stands for it.
        if self.state is not State.OPEN:
            return [post]
        return [post, Acknowledge(self.epoch, batch, outcome)]

    def _ask_for_turn(self) -> Sequence[Instruction]:
        if not self._waiting or self.running is not None or self._asked_for_turn:
            return []
        self._asked_for_turn = True
        return [TakeTurn()]


def _check_size(batch: Batch) -> None:
    """Also of a batch that will be skipped: its pages are entered into the books."""
    if not batch.ranges:
        raise InvalidInput(f"batch {batch.seq} is empty")
    if batch.ranges.page_count > LIMITS.pages_per_batch:
        raise InvalidInput(
            f"batch {batch.seq} has {batch.ranges.page_count} pages, "
            f"the limit is {LIMITS.pages_per_batch}"
        )


class Epochs:
    """Epoch numbers that grow, also over restarts of the host agent.

    They are derived from the clock (microseconds since 1970), so that nothing has
    to be stored. Where guests outlive the host agent, a clock may have been set back
    meanwhile: then theirs are stored, and `after` them comes the next.
    """

    def __init__(self) -> None:
        self._last = 0

    def after(self, epoch: int) -> None:
        """Epochs up to this one are in the past."""
        self._last = max(self._last, epoch)

    def next(self) -> int:
        """A number larger than all before it."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last

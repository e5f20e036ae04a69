"""The gate: events in, instructions out.

The gate decides which session of a guest is welcome, and which of its batches may run. It is the
host's side of the session protocol (hinting.proto) as a pure state machine: it uses no socket,
clock or lock. (`Epochs`, which numbers the sessions, reads the clock.) `GuestSessions` carries out
the gate's instructions. The guest's side is guest_agent/hinting.py. Violations are counted, and
guests banned, in rate_limits.py.

The gate keeps invariant I2: it returns `Welcome` only while no batch is `running`, and when an
epoch ends, it skips the batches that wait. A punch cannot be cancelled, so a running punch always
delays the Welcome. The gate also welcomes no session while the guest's memory door is closed (I5).
If the door closes while a batch runs, the door's fence keeps out the rest of the batch
(memory/fence.py).

The gate knows only the batches of its own process. A host agent that was killed may still punch,
until its last system call ends. So a host agent that adopts guests first takes a lock that the
killed one held: the kernel releases the lock only after that system call (flock(2),
persistence/database.py).
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

# A batch has at most 4 GiB in 128 ranges; two may wait for their acks. While the event loop handles
# a batch, other guests have to wait. With these limits it handles a full batch in well under a
# millisecond, without the punches; with 512 ranges, one flooding guest made the 99th percentile of
# all others' ack latency 1.4 to 1.8 times as long (docs/measurements.md).
LIMITS = pb.Limits(ranges_per_batch=128, pages_per_batch=1 << 20, batches_in_flight=2)

# A batch that has waited longer than this is skipped: its guest may have been reset meanwhile, and
# libvirt's event about the reset may not have arrived yet.
OLDEST_BATCH_S = 0.25


class State(Enum):
    """Whether batches may arrive.

    CLOSED: no session, or one that is not welcomed yet. OPEN: a session is welcomed. GONE: the
    guest is lost or destroyed; final.
    """

    CLOSED = "closed"
    OPEN = "open"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it arrived.

    :ivar epoch: the epoch that it names.
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
    """Lock the guest's RAM, call `Gate.turn_came`, carry out what it returns, and unlock."""


@dataclass(frozen=True)
class Run:
    """Reclaim this batch, then call `Gate.finished`, whatever the outcome is."""

    batch: Batch


@dataclass(frozen=True)
class Post:
    """Enter the outcome of a batch into the books. Returned once for each batch that `arrived`
    accepted."""

    batch: Batch
    outcome: Outcome


@dataclass(frozen=True)
class Acknowledge:
    """Tell a session the outcome of its batch."""

    session: int
    batch: Batch
    outcome: Outcome


Instruction = Welcome | EndSession | TakeTurn | Run | Post | Acknowledge


class Gate:
    """One guest's sessions and batches, from its first Hello until it is gone.

    A session's number is the epoch that it gets if it is welcomed. `turn_came` must be called only
    after a `TakeTurn`, and `finished` after a `Run`; all other methods may be called at any time.
    An event that does not matter any more returns no instruction, for example when a superseded
    session leaves.
    """

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.epoch = 0
        """The epoch of the last Welcome; 0 before the first."""
        self.door_is_open = True
        """Whether the guest's memory may be punched (I5)."""
        self.running: Batch | None = None
        """The batch of the last `Run` until `finished`; its epoch may have ended."""
        self._session: int | None = None
        self._waiting: deque[Batch] = deque()
        self._next_seq = 1
        self._last_batch_s = 0.0
        self._asked_for_turn = False
        self._gone: HintfleetError | None = None

    def connected(self, session: int) -> Sequence[Instruction]:
        """Note that a stream has sent Hello: it is the guest's session from now on, and is welcomed
        at once if that is possible. The session before it is ended, with its epoch. After `gone`,
        the new session is ended instead.

        :param session: a number larger than those of all sessions before.
        """
        if self._gone is not None:
            return [EndSession(session, self._gone)]
        superseded = self._end_session(TransientError("another agent of this guest has connected"))
        self._session = session
        return [*superseded, *self._welcome()]

    def left(self, session: int) -> Sequence[Instruction]:
        """Note that a session's stream has ended. If it was the newest session, its epoch ends, and
        the batches that wait are skipped."""
        if session != self._session:
            return []
        self._session = None
        return self._close(pb.WRONG_EPOCH)

    def gone(self, error: HintfleetError) -> Sequence[Instruction]:
        """Note that the guest is gone: no batch begins to run from now on, and its session, like
        every later one, is ended with `error`."""
        if self._gone is not None:
            return []
        self._gone = error
        ended = self._end_session(error, pb.GUEST_GONE)
        self.state = State.GONE
        return ended

    def door_closed(self, error: HintfleetError) -> Sequence[Instruction]:
        """Note that the guest's memory must not be punched until `door_opened`. The epoch ends, and
        the session is ended with `error`."""
        self.door_is_open = False
        return self._end_session(error, pb.GUEST_STOPPED)

    def door_opened(self) -> Sequence[Instruction]:
        """Note that the guest's memory may be punched; welcome a session that waits for that."""
        self.door_is_open = True
        return self._welcome()

    def arrived(self, session: int, batch: Batch) -> Sequence[Instruction]:
        """Let a batch wait for its turn; skip it at once if its session was superseded or ended.

        :raises InvalidInput: it came before the Welcome or out of sequence, or is empty or beyond
            the limits. The caller must end the session; nothing was done with the batch.
        """
        _check_size(batch)
        # The stream of such a session is still read for a moment.
        if session != self._session:
            return [Post(batch, skip(batch.ranges, pb.WRONG_EPOCH))]
        self._check(batch)
        self._next_seq += batch.epoch == self.epoch
        self._waiting.append(batch)
        self._last_batch_s = batch.received_s
        return self._ask_for_turn()

    def idle_s(self, now_s: float) -> float:
        """Return how long ago the last batch arrived, in seconds; 0 while a batch waits or runs."""
        return 0.0 if self.running is not None or self._waiting else now_s - self._last_batch_s

    def turn_came(self, now_s: float) -> Sequence[Instruction]:
        """Run the oldest batch that may run, and skip the older ones. The caller holds the lock on
        the guest's RAM.

        :param now_s: the time, on the clock of `Batch.received_s`.
        """
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
        """Note that the running batch has ended. Welcome a session that waits for that, and ask for
        a turn if batches wait."""
        self.running = None
        return [*self._done(batch, outcome), *self._welcome(), *self._ask_for_turn()]

    def _check(self, batch: Batch) -> None:
        """Raise InvalidInput: no Welcome yet, too many in flight, or not the next of its epoch."""
        if self.state is not State.OPEN:
            raise InvalidInput(f"batch {batch.seq} came before the welcome")
        if len(self._waiting) + (self.running is not None) >= LIMITS.batches_in_flight:
            raise InvalidInput(f"more than {LIMITS.batches_in_flight} batches in flight")
        if batch.epoch == self.epoch and batch.seq != self._next_seq:
            raise InvalidInput(f"batch {batch.seq} came where {self._next_seq} was due")

    def _why_skip(self, batch: Batch, now_s: float) -> pb.SkipReason.ValueType | None:
        """Return why a batch of the open session must not run; None if it may."""
        if batch.epoch != self.epoch:
            return pb.WRONG_EPOCH
        if now_s - batch.received_s > OLDEST_BATCH_S:
            return pb.STALE
        return None

    def _welcome(self) -> Sequence[Instruction]:
        """Begin the newest session's epoch if it has not begun, no batch is running (I2), and the
        guest's memory may be punched (I5); else return no instruction."""
        may_open = self.door_is_open and self.running is None
        if self.state is not State.CLOSED or self._session is None or not may_open:
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
        """End the epoch: the batches that wait are skipped and will never run (I2)."""
        if self.state is State.OPEN:
            self.state = State.CLOSED
        waiting, self._waiting = self._waiting, deque()
        return [Post(batch, skip(batch.ranges, reason)) for batch in waiting]

    def _done(self, batch: Batch, outcome: Outcome) -> Sequence[Instruction]:
        post = Post(batch, outcome)
        # If the batch's session has ended, nobody waits for the ack: the guest releases the batch's
        # chunks after the next Welcome (I1).
        if self.state is not State.OPEN:
            return [post]
        return [post, Acknowledge(self.epoch, batch, outcome)]

    def _ask_for_turn(self) -> Sequence[Instruction]:
        if not self._waiting or self.running is not None or self._asked_for_turn:
            return []
        self._asked_for_turn = True
        return [TakeTurn()]


def _check_size(batch: Batch) -> None:
    # A batch's size is checked even if the batch will be skipped, because skipped batches are
    # entered into the books, too.
    if not batch.ranges:
        raise InvalidInput(f"batch {batch.seq} is empty")
    if batch.ranges.page_count > LIMITS.pages_per_batch:
        raise InvalidInput(
            f"batch {batch.seq} has {batch.ranges.page_count} pages, "
            f"the limit is {LIMITS.pages_per_batch}"
        )


class Epochs:
    """Epoch numbers that grow, even over restarts of the host agent.

    They are taken from the clock (microseconds since 1970), so that nothing must be stored. But
    where guests outlive a host agent, the clock may be set back before the next host agent starts.
    So the epochs of such guests are stored, and the next host agent passes them to `after`.
    """

    def __init__(self) -> None:
        self._last = 0

    def after(self, epoch: int) -> None:
        """Make all further numbers larger than this one."""
        self._last = max(self._last, epoch)

    def next(self) -> int:
        """Return a number larger than all that `next` returned and `after` was given."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last

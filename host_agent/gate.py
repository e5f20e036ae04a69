"""Which batches of a guest may run: the host's side of the session protocol, pure.

It keeps I2 together with its caller: the caller opens a new epoch only while no
batch of this guest runs, and asks `admit` again right before it runs one. So once
an epoch is over, a batch of it that still waits somewhere is skipped.
"""

from __future__ import annotations

import time
from enum import Enum

from hintfleet.errors import InvalidInput
from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2 as pb

LIMITS = pb.Limits(ranges_per_batch=512, pages_per_batch=1 << 20, batches_in_flight=2)
"""A batch is at most 4 GiB in 512 ranges; two may wait for their acks."""

OLDEST_BATCH_S = 0.25
"""A batch that waited longer is skipped: its guest may have been reset meanwhile,
and the news of it be on its way."""


class State(Enum):
    """Whether batches are welcome."""

    CLOSED = "closed"
    OPEN = "open"
    GONE = "gone"
    """The guest was reset, stopped or destroyed; final."""


class Gate:
    """Epoch and sequence of one guest."""

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.epoch = 0
        self._next_seq = 1

    def open(self, epoch: int) -> None:
        """Begin an epoch; larger than all before. No batch of this guest may be running."""
        if self.state is not State.GONE:
            self.state, self.epoch, self._next_seq = State.OPEN, epoch, 1

    def close(self) -> None:
        """End the epoch: nothing runs until the next one."""
        if self.state is State.OPEN:
            self.state = State.CLOSED

    def gone(self) -> None:
        """The guest is no more; nothing runs ever again."""
        self.state = State.GONE

    def check(self, batch: pb.Batch, hinted: RangeSet) -> None:
        """Hold an arriving batch against the protocol.

        :raises InvalidInput: out of sequence, empty, or beyond the limits. The caller
            ends the session; nothing of the batch was touched.
        """
        if batch.epoch == self.epoch and batch.seq != self._next_seq:
            raise InvalidInput(f"batch {batch.seq} came where {self._next_seq} was due")
        if not hinted:
            raise InvalidInput(f"batch {batch.seq} is empty")
        if hinted.page_count > LIMITS.pages_per_batch:
            raise InvalidInput(
                f"batch {batch.seq} has {hinted.page_count} pages, "
                f"the limit is {LIMITS.pages_per_batch}"
            )
        if batch.epoch == self.epoch:
            self._next_seq += 1

    def admit(self, epoch: int, waited_s: float) -> pb.SkipReason.ValueType | None:
        """Whether a batch may run now: None, or why it must be skipped."""
        if self.state is State.GONE:
            return pb.GUEST_GONE
        if self.state is State.CLOSED or epoch != self.epoch:
            return pb.WRONG_EPOCH
        if waited_s > OLDEST_BATCH_S:
            return pb.STALE
        return None


class Epochs:
    """Epoch numbers that grow, also over restarts of the host agent.

    They are derived from the clock (microseconds since 1970), so that nothing has
    to be stored; a clock that is set back by less than the agent was down is harmless.
    """

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """A number larger than all before it."""
        self._last = max(self._last + 1, time.time_ns() // 1000)
        return self._last

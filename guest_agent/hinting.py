"""The hinting core: events in, instructions out.

The steps of a free chunk: isolate, batch, hint, acknowledge, release. This is the guest's side
of the session protocol (hinting.proto) as a pure state machine; `guest_agent.session` carries
out its instructions over gRPC. The core knows no socket and no clock, and does not know which
isolator it has.

It keeps invariant I1: ranges that `isolated` was given are released only by the ack of their
batch or by a later Welcome, whatever else happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hintfleet.errors import HintfleetError
from hintfleet.ranges import EMPTY, RangeSet


class ProtocolViolation(HintfleetError):
    """The host agent sent a message that the protocol does not allow here."""


class State(Enum):
    """The state of the session."""

    DISCONNECTED = "disconnected"
    """No stream, or no Welcome yet: nothing may be isolated."""
    OPEN = "open"
    """Welcomed: batches may be sent."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds from the Welcome."""

    ranges_per_batch: int
    pages_per_batch: int
    batches_in_flight: int


@dataclass(frozen=True)
class Isolate:
    """Ask the isolator for chunks, then call `HintingCore.isolated` with them."""

    max_ranges: int
    max_pages: int


@dataclass(frozen=True)
class Send:
    """Send one batch."""

    epoch: int
    seq: int
    ranges: RangeSet


@dataclass(frozen=True)
class Release:
    """Give ranges back to the guest's allocator.

    :ivar hinted: whether the host has dealt with them; if not, they are to be hinted again.
    """

    ranges: RangeSet
    hinted: bool


@dataclass(frozen=True)
class ReportNow:
    """Tell the isolator to make free chunks ready.

    :ivar thorough: all free chunks, however few are new.
    """

    thorough: bool = False


@dataclass(frozen=True, kw_only=True)
class SendSettled:
    """Answer a settle request."""

    request_id: int
    batches: int
    hinted_pages: int


Instruction = Isolate | Send | Release | ReportNow | SendSettled


@dataclass(kw_only=True)
class _Settling:
    request_id: int
    batches_before: int
    pages_before: int
    pages_at_last_pass: int


class HintingCore:
    """One guest's side of the protocol, over any number of sessions.

    Every method takes an event and returns instructions, to be carried out in order. For an
    event that came too late (an ack of an earlier epoch) it returns none.
    """

    def __init__(self, still_isolated: RangeSet = EMPTY) -> None:
        """Start disconnected.

        :param still_isolated: the ranges that an earlier agent left isolated.
        """
        self.state = State.DISCONNECTED
        self.batch_count = 0
        self.hinted_page_count = 0
        self._epoch = 0
        self._seq = 0
        self._limits = Limits(ranges_per_batch=0, pages_per_batch=0, batches_in_flight=0)
        self._in_flight: dict[int, RangeSet] = {}
        # Not merged into one set: an isolator must get back exactly the sets that it returned.
        self._awaiting_welcome: list[RangeSet] = [still_isolated] if still_isolated else []
        self._settling: _Settling | None = None
        self._allowance_pages: int | None = None
        self._unfinished = False
        self._stopped = False

    @property
    def still_isolated(self) -> RangeSet:
        """All ranges that are isolated now, for a Hello."""
        held = [*self._awaiting_welcome, *self._in_flight.values()]
        return RangeSet(one for ranges in held for one in ranges)

    def welcomed(self, epoch: int, limits: Limits) -> Sequence[Instruction]:
        """Open the session. No earlier batch can run any more (I2), so release its ranges (I4)."""
        self.lost()
        self.state = State.OPEN
        self._epoch, self._seq, self._limits = epoch, 0, limits
        # The acks are lost, so nobody knows whether the host acted on them: hint them again.
        released = [Release(ranges, hinted=False) for ranges in self._awaiting_welcome]
        self._awaiting_welcome = []
        return [*released, *self._report_now()]

    def lost(self) -> Sequence[Instruction]:
        """Note that the stream has ended."""
        self.state = State.DISCONNECTED
        # Batches in flight may still run on the host: keep their ranges until a Welcome (I1).
        self._awaiting_welcome += self._in_flight.values()
        self._in_flight = {}
        self._settling = None
        return []

    def acknowledged(self, epoch: int, seq: int, *, acted: bool) -> Sequence[Instruction]:
        """Release the ranges of a batch that the host has answered.

        :param acted: False if the host skipped it for now (it came too late).
        :raises ProtocolViolation: an ack of this epoch for no batch in flight.
            The caller should end the session; nothing was released.
        """
        if self.state is not State.OPEN or epoch != self._epoch:
            return []
        if seq not in self._in_flight:
            raise ProtocolViolation(f"ack of batch {seq}, which is not in flight")
        return [Release(self._in_flight.pop(seq), hinted=acted), *self._isolate()]

    def allowed(self, pages: int | None) -> Sequence[Instruction]:
        """Note how many pages the host allows to be hinted from now on; None for no bound."""
        self._allowance_pages = pages
        return self._isolate()

    def ready(self) -> Sequence[Instruction]:
        """Isolate: the isolator has signalled that enough chunks may be ready."""
        return self._isolate()

    def period_passed(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Look for free chunks below the threshold; continue a settle."""
        nothing = isolator_idle or not self._may_hint
        if self.state is not State.OPEN or nothing:
            return self._continue_settling(isolator_idle=nothing)
        return self._report_now()

    def isolated(
        self, ranges: RangeSet, *, isolator_idle: bool, unfinished: bool = False
    ) -> Sequence[Instruction]:
        """Send a batch of the ranges that `Isolate` has isolated, which may be none.

        :param unfinished: the isolator has more that must be hinted, whatever is allowed.
        """
        self._unfinished = unfinished
        if not ranges:
            return self._continue_settling(isolator_idle=isolator_idle)
        self._seq += 1
        self._in_flight[self._seq] = ranges
        self.batch_count += 1
        self.hinted_page_count += ranges.page_count
        if self._allowance_pages is not None:
            self._allowance_pages = max(0, self._allowance_pages - ranges.page_count)
        return [Send(self._epoch, self._seq, ranges), *self._isolate()]

    def settle_requested(self, request_id: int) -> Sequence[Instruction]:
        """Look for free chunks now; answer when all that may be hinted is acknowledged."""
        self._settling = _Settling(
            request_id=request_id,
            batches_before=self.batch_count,
            pages_before=self.hinted_page_count,
            pages_at_last_pass=self.hinted_page_count,
        )
        return self._report_now(thorough=True)

    def stop(self) -> None:
        """Isolate nothing from now on. Isolated ranges are still released by their acks."""
        self._stopped = True

    @property
    def settling(self) -> bool:
        """Whether a settle request waits for its answer."""
        return self._settling is not None

    @property
    def _may_hint(self) -> bool:
        return self._unfinished or (not self._stopped and self._allowance_pages != 0)

    def _report_now(self, *, thorough: bool = False) -> Sequence[Instruction]:
        """Make free chunks ready and isolate them, unless none may be hinted."""
        return [ReportNow(thorough), *self._isolate()] if self._may_hint else []

    def _isolate(self) -> Sequence[Instruction]:
        full = len(self._in_flight) >= self._limits.batches_in_flight
        if self.state is not State.OPEN or full or not self._may_hint:
            return []
        pages = self._limits.pages_per_batch
        # The rest of a batch of the kernel module ignores the allowance: the module releases
        # whole batches, so a part that is not hinted would keep the others isolated.
        if self._allowance_pages is not None and not self._unfinished:
            pages = min(pages, self._allowance_pages)
        return [Isolate(self._limits.ranges_per_batch, pages)]

    def _continue_settling(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Answer a settle request once a whole pass gave nothing and nothing is in flight.

        Where nothing may be hinted, no pass is needed.
        """
        settling = self._settling
        if settling is None or self._in_flight or not isolator_idle:
            return []
        # One pass may find only a part of the free chunks (mm/page_reporting.c handles 1/16 of
        # a list at a time), so repeat a pass that found some.
        if self.hinted_page_count != settling.pages_at_last_pass:
            settling.pages_at_last_pass = self.hinted_page_count
            return self._report_now(thorough=True)
        self._settling = None
        return [
            SendSettled(
                request_id=settling.request_id,
                batches=self.batch_count - settling.batches_before,
                hinted_pages=self.hinted_page_count - settling.pages_before,
            )
        ]

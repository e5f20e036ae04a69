"""The hinting core: events in, instructions out.

The steps of a free chunk: isolate, batch, hint, acknowledge, release. The core is the guest's side
of the session protocol (hinting.proto) as a pure state machine; `guest_agent.session` carries
out its instructions, with gRPC and the isolator. The core uses no socket and no clock, and does
not know which isolator it has.

The core keeps invariant I1: ranges that `isolated` was given are released only after the ack of
their batch or after a later Welcome, whatever else happens. It also keeps I4: ranges that an
earlier agent left isolated are released only after a Welcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hintfleet.errors import HintfleetError
from hintfleet.ranges import EMPTY, RangeSet


class ProtocolViolation(HintfleetError):
    """The host agent sent a message that the protocol does not allow in this state."""


class State(Enum):
    """The state of the session."""

    DISCONNECTED = "disconnected"
    """No stream, or no Welcome yet: the core asks for no chunks. Some may still be isolated."""
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
    """Call the isolator's `isolate`, then `HintingCore.isolated` with its result, even if empty."""

    max_ranges: int
    max_pages: int


@dataclass(frozen=True)
class Send:
    """Send one batch to the host agent."""

    epoch: int
    seq: int
    ranges: RangeSet


@dataclass(frozen=True)
class Release:
    """Call the isolator's `release`, which gives the ranges back to the guest's allocator, now or
    later.

    :ivar hinted: False if the ranges are to be hinted again: the host skipped their batch because
        it was too old, or no ack of it came.
    """

    ranges: RangeSet
    hinted: bool


@dataclass(frozen=True)
class ReportNow:
    """Call the isolator's `report_now`, which begins to make free chunks ready.

    :ivar thorough: whether to make all free chunks ready, even if only few are new.
    """

    thorough: bool = False


@dataclass(frozen=True, kw_only=True)
class SendSettled:
    """Answer a settle request: how many batches and pages were hinted since it arrived."""

    request_id: int
    batches: int
    hinted_pages: int


Instruction = Isolate | Send | Release | ReportNow | SendSettled


@dataclass(frozen=True, kw_only=True)
class _Settling:
    request_id: int
    batches_before: int
    pages_before: int


class HintingCore:
    """One guest's side of the protocol, over any number of sessions.

    Every public method except `stop` takes an event and returns instructions, which the caller must
    carry out in order. For an event that came too late (an ack of an earlier epoch) the method
    returns no instructions.
    """

    def __init__(self, still_isolated: RangeSet = EMPTY) -> None:
        """Start disconnected.

        :param still_isolated: the ranges that an earlier agent left isolated.
        """
        self.state = State.DISCONNECTED
        self.batch_count = 0
        self.hinted_page_count = self.acknowledged_page_count = 0
        self._epoch = 0
        self._seq = 0
        self._limits = Limits(ranges_per_batch=0, pages_per_batch=0, batches_in_flight=0)
        self._in_flight: dict[int, RangeSet] = {}
        # Not merged into one set: an isolator must get back exactly the sets that it returned.
        self._awaiting_welcome: list[RangeSet] = [still_isolated] if still_isolated else []
        self._settling: list[_Settling] = []
        self._pages_at_last_pass = 0
        """`hinted_page_count` when the latest pass for a settle request began."""
        self._allowance_pages: int | None = None
        self._unfinished = False
        self._stopped = False

    @property
    def still_isolated(self) -> RangeSet:
        """All ranges that this core was given as isolated, and for which it has returned no Release
        yet; Hello has them. The isolator may hold more (`isolated_pages`)."""
        held = [*self._awaiting_welcome, *self._in_flight.values()]
        return RangeSet(one for ranges in held for one in ranges)

    def welcomed(self, epoch: int, limits: Limits) -> Sequence[Instruction]:
        """Open the session, and release the ranges of all earlier batches (I4): the host has sent
        Welcome, so none of these batches can run any more (I2). Then ask for free chunks, unless
        none may be hinted."""
        self.lost()
        self.state = State.OPEN
        self._epoch, self._seq, self._limits = epoch, 0, limits
        # No ack of these ranges came, so the guest does not know whether the host has punched
        # them: they are hinted again.
        released = [Release(ranges, hinted=False) for ranges in self._awaiting_welcome]
        self._awaiting_welcome = []
        return [*released, *self._report_now()]

    def lost(self) -> Sequence[Instruction]:
        """Note that the stream has ended. Settle requests that wait get no answer any more."""
        self.state = State.DISCONNECTED
        # Batches in flight may still run on the host: keep their ranges until a Welcome (I1).
        self._awaiting_welcome += self._in_flight.values()
        self._in_flight = {}
        self._settling = []
        return []

    def acknowledged(self, epoch: int, seq: int, *, acted: bool) -> Sequence[Instruction]:
        """Release the ranges of a batch that the host has answered, and ask for more chunks.

        Do nothing if the ack is of another epoch, or if the session is not open.

        :param acted: False if the host skipped the batch because it had waited too long or is of
            an earlier epoch: its ranges are to be hinted again.
        :raises ProtocolViolation: this epoch has no such batch in flight. Nothing was released;
            the caller should end the session.
        """
        if self.state is not State.OPEN or epoch != self._epoch:
            return []
        if seq not in self._in_flight:
            raise ProtocolViolation(f"ack of batch {seq}, which is not in flight")
        ranges = self._in_flight.pop(seq)
        self.acknowledged_page_count += ranges.page_count
        return [Release(ranges, hinted=acted), *self._isolate()]

    def allowed(self, pages: int | None) -> Sequence[Instruction]:
        """Note how many pages the host allows to be hinted (None for no bound), and ask for chunks.

        The pages of batches in flight are subtracted: when the host computed the allowance, they
        were resident.
        """
        if pages is not None:
            in_flight_pages = sum(ranges.page_count for ranges in self._in_flight.values())
            pages = max(0, pages - in_flight_pages)
        self._allowance_pages = pages
        return self._isolate()

    def ready(self) -> Sequence[Instruction]:
        """Ask for chunks before the period has passed, after the isolator has signalled that enough
        may be ready."""
        return self._isolate()

    def period_passed(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Ask for free chunks, without a signal of the isolator.

        Do not ask if the isolator is idle, if nothing may be hinted, or if no session is open: then
        only continue settle requests.
        """
        nothing = isolator_idle or not self._may_hint
        if self.state is not State.OPEN or nothing:
            return self._continue_settling(isolator_idle=nothing)
        return self._report_now()

    def isolated(
        self, ranges: RangeSet, *, isolator_idle: bool, unfinished: bool = False
    ) -> Sequence[Instruction]:
        """Send a batch of the ranges that `Isolate` has isolated, and ask for more chunks.

        If there are no ranges, send nothing, and continue settle requests.

        :param unfinished: the isolator holds the rest of a batch that it can only release as a
            whole: this rest must be hinted, too, even beyond the allowance.
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
        """Ask for all free chunks now. `SendSettled` is returned later, when all that may be hinted
        is acknowledged, together with those of earlier requests that still wait.
        """
        self._settling.append(
            _Settling(
                request_id=request_id,
                batches_before=self.batch_count,
                pages_before=self.hinted_page_count,
            )
        )
        self._pages_at_last_pass = self.hinted_page_count
        return self._report_now(thorough=True)

    def stop(self) -> None:
        """Isolate and hint nothing more, except the rest of an unfinished batch of the kernel
        module. Isolated ranges are still released by their acks or a Welcome."""
        self._stopped = True

    @property
    def settling(self) -> bool:
        """Whether a settle request waits for its answer."""
        return bool(self._settling)

    @property
    def may_send(self) -> bool:
        """Whether a batch could be sent now, if chunks were isolated: a session is open, and the
        host allows it. (Too many batches may be in flight.)"""
        return self.state is State.OPEN and self._may_hint

    @property
    def _may_hint(self) -> bool:
        return self._unfinished or (not self._stopped and self._allowance_pages != 0)

    def _report_now(self, *, thorough: bool = False) -> Sequence[Instruction]:
        """Have free chunks made ready, and ask for them; do nothing if none may be hinted."""
        return [ReportNow(thorough), *self._isolate()] if self._may_hint else []

    def _isolate(self) -> Sequence[Instruction]:
        full = len(self._in_flight) >= self._limits.batches_in_flight
        if self.state is not State.OPEN or full or not self._may_hint:
            return []
        pages = self._limits.pages_per_batch
        # The allowance does not bound the rest of an unfinished batch of the kernel module: the
        # module releases only whole batches, so all of the batch would stay isolated until the
        # rest is hinted.
        if self._allowance_pages is not None and not self._unfinished:
            pages = min(pages, self._allowance_pages)
        return [Isolate(self._limits.ranges_per_batch, pages)]

    def _continue_settling(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Answer all settle requests if nothing was hinted since their last pass began; else begin
        another pass.

        Do nothing while a batch is in flight or the isolator is busy. Begin no pass if nothing
        may be hinted.
        """
        if not self._settling or self._in_flight or not isolator_idle:
            return []
        # One pass may find only a part of the free chunks (mm/page_reporting.c handles 1/16 of
        # a free list at a time). So after a pass that found some, begin another one.
        if self.hinted_page_count != self._pages_at_last_pass:
            self._pages_at_last_pass = self.hinted_page_count
            return self._report_now(thorough=True)
        answered, self._settling = self._settling, []
        return [
            SendSettled(
                request_id=one.request_id,
                batches=self.batch_count - one.batches_before,
                hinted_pages=self.hinted_page_count - one.pages_before,
            )
            for one in answered
        ]

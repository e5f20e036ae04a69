"""The hinting core: events in, instructions out.

What happens to a free chunk: isolate, batch, hint, acknowledge, release. This is
the guest's side of the session protocol (hinting.proto) as a pure state machine;
`guest_agent.session` carries out its instructions over gRPC. It knows neither
which isolator it has nor any socket or clock.

It keeps invariant I1: what `isolated` was told is released only by the ack of
its batch or by a later welcome, whatever else happens in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hintfleet.errors import HintfleetError
from hintfleet.ranges import EMPTY, RangeSet


class ProtocolViolation(HintfleetError):
    """The host agent said what the protocol does not allow here."""


class State(Enum):
    """Where the session stands."""

    DISCONNECTED = "disconnected"
    """No stream, or one that is not welcomed yet: nothing may be isolated."""
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
    """Ask the isolator for chunks, then tell `HintingCore.isolated`."""

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
    """Give ranges back to the guest's allocator; `hinted` unless the host did not act on them."""

    ranges: RangeSet
    hinted: bool


@dataclass(frozen=True)
class ReportNow:
    """Have the isolator make ready what is free; `thorough`: all of it, however little."""

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

    Every method takes an event and returns what to do, in order. An event that
    is no longer of any concern (an ack of an earlier epoch) returns nothing.
    """

    def __init__(self, still_isolated: RangeSet = EMPTY) -> None:
        """Start disconnected, with what an earlier agent left isolated."""
        self.state = State.DISCONNECTED
        self.batch_count = 0
        self.hinted_page_count = 0
        self._epoch = 0
        self._seq = 0
        self._limits = Limits(ranges_per_batch=0, pages_per_batch=0, batches_in_flight=0)
        self._in_flight: dict[int, RangeSet] = {}
        # Kept one by one: an isolator takes back exactly what it gave.
        self._unfenced: list[RangeSet] = [still_isolated] if still_isolated else []
        self._settling: _Settling | None = None
        self._allowance_pages: int | None = None
        self._unfinished = False
        self._stopped = False

    @property
    def still_isolated(self) -> RangeSet:
        """All that is isolated now: what a Hello has to say."""
        held = [*self._unfenced, *self._in_flight.values()]
        return RangeSet(one for ranges in held for one in ranges)

    def welcomed(self, epoch: int, limits: Limits) -> Sequence[Instruction]:
        """No earlier batch can run any more: earlier ranges may go back (I2, I4)."""
        self.lost()
        self.state = State.OPEN
        self._epoch, self._seq, self._limits = epoch, 0, limits
        # Whether the host acted on them is not known: hint them again.
        released = [Release(ranges, hinted=False) for ranges in self._unfenced]
        self._unfenced = []
        return [*released, *self._look()]

    def lost(self) -> Sequence[Instruction]:
        """The stream ended: batches in flight may still run on the host, so keep them."""
        self.state = State.DISCONNECTED
        self._unfenced += self._in_flight.values()
        self._in_flight = {}
        self._settling = None
        return []

    def acknowledged(self, epoch: int, seq: int, *, acted: bool) -> Sequence[Instruction]:
        """A batch was dealt with.

        :param acted: False if the host skipped it for now (it came too late).
        :raises ProtocolViolation: an ack of this epoch for no batch in flight.
            The caller should end the session; nothing was released.
        """
        if self.state is not State.OPEN or epoch != self._epoch:
            return []
        if seq not in self._in_flight:
            raise ProtocolViolation(f"ack of batch {seq}, which is not in flight")
        return [Release(self._in_flight.pop(seq), hinted=acted), *self._ask()]

    def allowed(self, pages: int | None) -> Sequence[Instruction]:
        """The host says how much may be hinted from now on; None for no bound."""
        self._allowance_pages = pages
        return self._ask()

    def ready(self) -> Sequence[Instruction]:
        """The isolator woke us: there may be enough to isolate."""
        return self._ask()

    def period_passed(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Time to look for what the threshold did not bring."""
        nothing = isolator_idle or not self._may_hint
        if self.state is not State.OPEN or nothing:
            return self._settle_on(isolator_idle=nothing)
        return self._look()

    def isolated(
        self, ranges: RangeSet, *, isolator_idle: bool, unfinished: bool = False
    ) -> Sequence[Instruction]:
        """The answer to `Isolate`: what is now isolated, perhaps nothing.

        :param unfinished: there is more, which has to be hinted whatever is allowed.
        """
        self._unfinished = unfinished
        if not ranges:
            return self._settle_on(isolator_idle=isolator_idle)
        self._seq += 1
        self._in_flight[self._seq] = ranges
        self.batch_count += 1
        self.hinted_page_count += ranges.page_count
        if self._allowance_pages is not None:
            self._allowance_pages = max(0, self._allowance_pages - ranges.page_count)
        return [Send(self._epoch, self._seq, ranges), *self._ask()]

    def settle_requested(self, request_id: int) -> Sequence[Instruction]:
        """Report now; answer when everything that may be hinted was acknowledged."""
        self._settling = _Settling(
            request_id=request_id,
            batches_before=self.batch_count,
            pages_before=self.hinted_page_count,
            pages_at_last_pass=self.hinted_page_count,
        )
        return self._look(thorough=True)

    def stop(self) -> None:
        """Isolate nothing from now on. What is isolated still goes back with its acks."""
        self._stopped = True

    @property
    def settling(self) -> bool:
        """Whether a settle request waits for its answer."""
        return self._settling is not None

    @property
    def _may_hint(self) -> bool:
        return self._unfinished or (not self._stopped and self._allowance_pages != 0)

    def _look(self, *, thorough: bool = False) -> Sequence[Instruction]:
        """Look for what is free: not if none of it may be hinted."""
        return [ReportNow(thorough), *self._ask()] if self._may_hint else []

    def _ask(self) -> Sequence[Instruction]:
        full = len(self._in_flight) >= self._limits.batches_in_flight
        if self.state is not State.OPEN or full or not self._may_hint:
            return []
        pages = self._limits.pages_per_batch
        if self._allowance_pages is not None and not self._unfinished:
            pages = min(pages, self._allowance_pages)
        return [Isolate(self._limits.ranges_per_batch, pages)]

    def _settle_on(self, *, isolator_idle: bool) -> Sequence[Instruction]:
        """Settled when a whole pass of the isolator gave nothing, or nothing may be hinted,
        and nothing is in flight.

        One pass may give only part of what is free (mm/page_reporting.c looks at
        1/16 of a list at a time), so a pass that gave something is repeated.
        """
        settling = self._settling
        if settling is None or self._in_flight or not isolator_idle:
            return []
        if self.hinted_page_count != settling.pages_at_last_pass:
            settling.pages_at_last_pass = self.hinted_page_count
            return self._look(thorough=True)
        self._settling = None
        return [
            SendSettled(
                request_id=settling.request_id,
                batches=self.batch_count - settling.batches_before,
                hinted_pages=self.hinted_page_count - settling.pages_before,
            )
        ]

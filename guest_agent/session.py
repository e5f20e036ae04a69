"""The guest's end of a hinting session: gRPC outside, `HintingCore` inside.

All of it runs on one event loop, which alone touches the core and the isolator; the
isolator's wake callback and the stream's reader only put events into an inbox. (gRPC's
threaded client would wake up ten times a second for each open stream.) A lost link is
tried again for as long as the agent lives, with a pause that grows until a Welcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import grpc
from grpc import aio

from guest_agent import hinting
from guest_agent.isolation.isolator import Isolator
from guest_agent.procfs import own_rss_bytes
from hintfleet import __version__
from hintfleet.errors import InvalidInput, from_rpc_error
from hintfleet.logs import fields
from hintfleet.ranges import decode, encode
from hintfleet.settings import SHORTEST_REPORT_PERIOD_MS
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

_SETTLING_PERIOD_S = 0.02
_TELEMETRY_PERIOD_S = 1.0
_POLLS_BEFORE_REST = 10
_RESTING_PERIODS_S = (0.0, 1.0, 2.0)
"""The shortest pause after so many tens of idle polls. The kernel's own reporting makes
one of 2 s, too; and memory that is taken into use ends the rest, before it is freed."""
_STIR_PAGES = 2048
"""A poll is idle if less than this is used again or hinted until the next one: in an idle guest,
too, kernel and daemons split a chunk and merge it now and then."""
_LONGEST_SILENCE_S = 10.0
_NEWS_BYTES = 1 << 20
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_LOOK_FOR_ACKS_S = 0.01

# Reasons that hold for a whole batch and may be gone next time. Not OUTSIDE_RAM and its
# like: hinting those again would go on for ever.
_SKIPPED_FOR_NOW = frozenset({pb.STALE, pb.WRONG_EPOCH})

# A session ends with one of these when the host will not have this agent again.
_FINAL_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ABORTED,
    }
)


@dataclass(frozen=True, kw_only=True)
class HelloFacts:
    """What Hello says about this guest, besides what is still isolated."""

    identity: pb.Identity
    boot_id: str
    chunk_order: int
    tracker: str


class _Event(Enum):
    """What the inbox holds besides the host's messages."""

    WAKE = auto()
    """The isolator may have something."""
    TICK = auto()
    """A period has passed."""
    ENDED = auto()
    """The stream is over."""


_Call = aio.StreamStreamCall[Any, Any]

_log = logging.getLogger("hintfleet.guest.session")


class HintingSession:
    """Keeps one guest in session with its host agent. Owns the isolator."""

    def __init__(
        self,
        channel: aio.Channel,
        isolator: Isolator,
        facts: HelloFacts,
        free_bytes: Callable[[], int],
    ) -> None:
        """Start the isolator. Must be called on the event loop that will run the session.

        :param free_bytes: the guest's free memory, asked every second at the most.
        :raises Refused: the isolator cannot work here.
        """
        self._stub = HintingServiceStub(channel)
        self._isolator = isolator
        self._facts = facts
        self._free_bytes = free_bytes
        self._told_free_bytes = -_NEWS_BYTES
        self._told_at_s = self._looked_at_s = 0.0
        self._period_s = 1.0
        self._idle_polls = 0
        """In a row."""
        self._stirred_pages = 0
        """Used again or hinted since the last look."""
        self._epoch = 0
        """Of this session; 0 until it is welcomed."""
        self._inbox: asyncio.Queue[pb.HostMessage | _Event | Exception] = asyncio.Queue()
        self._outbox: asyncio.Queue[pb.GuestMessage] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._next_tick = loop.call_later(0, int)
        self._next_tick.cancel()  # until the first session

        def wake() -> None:
            loop.call_soon_threadsafe(self._inbox.put_nowait, _Event.WAKE)

        self._core = hinting.HintingCore(isolator.start(wake))

    async def run(self) -> None:
        """Hold sessions until cancelled; what is isolated then stays so.

        :raises HintfleetError: the host refused this agent for good.
        """
        pause_s = _SHORTEST_PAUSE_S
        try:
            while True:
                self._epoch = 0
                error = await self._run_once()
                self._log_end(error)
                if error is not None and error.code() in _FINAL_CODES:
                    raise from_rpc_error(error, "the host agent ended the hinting session")
                if self._epoch:  # the host is there, and only the link was lost
                    pause_s = _SHORTEST_PAUSE_S
                await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._isolator.close()

    async def finish(self) -> None:
        """Hint nothing more; return when all that was isolated is back in use.

        It takes as long as the acks do: for ever while there is no host agent. `run` must be
        running, and is not needed afterwards.
        """
        self._core.stop()
        while self._core.still_isolated:
            await asyncio.sleep(_LOOK_FOR_ACKS_S)
        self._isolator.idle()  # ends the pass

    async def _run_once(self) -> grpc.RpcError | None:
        """One stream from Hello to its end; the error that the host ended it with."""
        self._outbox = asyncio.Queue()
        self._outbox.put_nowait(pb.GuestMessage(hello=self._hello()))
        call: _Call = self._stub.Session(wait_for_ready=True)  # type: ignore[call-arg]
        tasks = [asyncio.create_task(work(call)) for work in (self._read, self._write)]
        try:
            await self._loop()
        except (hinting.ProtocolViolation, InvalidInput) as violation:
            # Its host agent may be another one soon; without an agent, the guest is none's.
            _log.error("host agent broke the protocol", extra=fields(reason=violation))
        finally:
            self._core.lost()
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.wait(tasks)
        return _why_ended(tasks)

    def _log_end(self, error: grpc.RpcError | None) -> None:
        if self._epoch:
            reason = error.details() if error is not None else "closed by either side"
            _log.info("session ended", extra=fields(epoch=self._epoch, reason=reason))

    async def _read(self, call: _Call) -> None:
        try:
            async for message in call:
                self._inbox.put_nowait(message)
        finally:
            self._inbox.put_nowait(_Event.ENDED)

    async def _write(self, call: _Call) -> None:
        # A stream that ends while it is written to is told of by `_read`.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outbox.get())

    async def _loop(self) -> None:
        """Deal with events until the stream ends."""
        self._tick_later()
        try:
            while (event := await self._inbox.get()) is not _Event.ENDED:
                rested = self._resting_period_s > 0
                if isinstance(event, Exception):
                    raise event
                if event is _Event.TICK:
                    self._carry_out(self._core.period_passed(isolator_idle=self._isolator.idle()))
                elif isinstance(event, pb.HostMessage):
                    self._carry_out(self._heard(event))
                elif self._isolator.enough():
                    self._carry_out(self._core.ready())
                if self._core.settling or self._stirred_pages >= _STIR_PAGES:
                    self._idle_polls = 0
                if self._core.settling or event is _Event.WAKE or rested:
                    self._tick_later()
        finally:
            self._next_tick.cancel()

    @property
    def _resting_period_s(self) -> float:
        """Waking is what an idle agent costs, so it looks less and less often. 0: no rest."""
        tens = self._idle_polls // _POLLS_BEFORE_REST
        return _RESTING_PERIODS_S[min(tens, len(_RESTING_PERIODS_S) - 1)]

    def _tick_later(self) -> None:
        """Have a period pass, unless one does so before."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + self._pause_s()
        if self._next_tick.cancelled() or at_s < self._next_tick.when():
            self._next_tick.cancel()
            self._next_tick = loop.call_at(at_s, self._period_passed)

    def _pause_s(self) -> float:
        polled = self._isolator.must_be_polled
        if self._core.settling:
            return _SETTLING_PERIOD_S
        if not polled and not self._isolator.idle():
            return self._period_s
        if self._resting_period_s:
            return max(self._period_s, self._resting_period_s)
        return self._period_s if polled else _TELEMETRY_PERIOD_S

    def _period_passed(self) -> None:
        try:
            self._poll()
        except Exception as error:  # noqa: BLE001 - the event loop would log it and go on
            self._inbox.put_nowait(error)

    def _poll(self) -> None:
        """Have a period's work done if there is any: most periods of an idle guest pass without
        waking more than this."""
        self._next_tick.cancel()  # so that the next one may be later
        if self._core.settling or not self._isolator.idle():
            self._inbox.put_nowait(_Event.TICK)
        self._idle_polls += 1
        self._stirred_pages = 0
        self._tick_later()
        self._tell_news()

    def _tell_news(self) -> None:
        """Telemetry, if free memory has changed, or nothing was said for long: an idle
        guest's agent must cost next to nothing."""
        now_s = time.monotonic()
        due = now_s - self._looked_at_s >= _TELEMETRY_PERIOD_S
        if not due or self._core.state is not hinting.State.OPEN:
            return
        self._looked_at_s = now_s
        free_bytes = self._free_bytes()
        unchanged = abs(free_bytes - self._told_free_bytes) < _NEWS_BYTES
        if unchanged and now_s - self._told_at_s < _LONGEST_SILENCE_S:
            return
        self._told_free_bytes, self._told_at_s = free_bytes, now_s
        telemetry = pb.Telemetry(
            agent_cpu_us=time.process_time_ns() // 1000,
            agent_rss_bytes=own_rss_bytes(),
            tracker_bytes=self._isolator.tracker_bytes(),
            free_bytes=free_bytes,
        )
        self._outbox.put_nowait(pb.GuestMessage(telemetry=telemetry))

    def _heard(self, message: pb.HostMessage) -> Sequence[hinting.Instruction]:
        kind = message.WhichOneof("message")
        if kind == "ack":
            ack = message.ack
            acted = not any(skipped.reason in _SKIPPED_FOR_NOW for skipped in ack.skipped)
            return self._core.acknowledged(ack.epoch, ack.seq, acted=acted)
        if kind == "welcome":
            welcome = message.welcome
            self._epoch = welcome.epoch
            _log.info("session welcomed", extra=fields(epoch=welcome.epoch))
            self._obey(welcome.policy)
            return self._core.welcomed(
                welcome.epoch,
                hinting.Limits(
                    ranges_per_batch=welcome.limits.ranges_per_batch,
                    pages_per_batch=welcome.limits.pages_per_batch,
                    batches_in_flight=welcome.limits.batches_in_flight,
                ),
            )
        if kind == "settle":
            return self._core.settle_requested(message.settle.request_id)
        if kind == "refaulted":
            ranges = decode(message.refaulted.ranges)
            self._stirred_pages += ranges.page_count
            self._isolator.used_again(ranges)
        elif kind == "policy":
            return self._obey(message.policy)
        return []

    def _obey(self, policy: pb.Policy) -> Sequence[hinting.Instruction]:
        self._idle_polls = 0
        self._period_s = max(SHORTEST_REPORT_PERIOD_MS, policy.report_period_ms) / 1000
        self._isolator.only_cold(
            policy.cold_after_ms / 1000 if policy.kind == pb.Policy.COLD else 0.0
        )
        bounded = policy.kind == pb.Policy.PRESSURE
        return self._core.allowed(policy.allowance_pages if bounded else None)

    def _carry_out(self, instructions: Sequence[hinting.Instruction]) -> None:
        todo = deque(instructions)
        while todo:
            todo.extend(self._do(todo.popleft()))

    def _do(self, instruction: hinting.Instruction) -> Sequence[hinting.Instruction]:
        match instruction:
            case hinting.Isolate(max_ranges, max_pages):
                ranges = self._isolator.isolate(max_ranges, max_pages)
                self._stirred_pages += ranges.page_count
                idle = bool(ranges) or self._isolator.idle()
                more = self._isolator.unfinished
                return self._core.isolated(ranges, isolator_idle=idle, unfinished=more)
            case hinting.Send(epoch, seq, ranges):
                batch = pb.Batch(epoch=epoch, seq=seq, ranges=encode(ranges))
                self._outbox.put_nowait(pb.GuestMessage(batch=batch))
            case hinting.Release(ranges, hinted):
                self._isolator.release(ranges, hinted=hinted)
            case hinting.ReportNow(thorough):
                self._isolator.report_now(thorough=thorough)
            case hinting.SendSettled():
                settled = pb.Settled(
                    request_id=instruction.request_id,
                    batches=instruction.batches,
                    hinted_pages=instruction.hinted_pages,
                )
                self._outbox.put_nowait(pb.GuestMessage(settled=settled))
        return ()

    def _hello(self) -> pb.Hello:
        facts = self._facts
        return pb.Hello(
            identity=facts.identity,
            boot_id=facts.boot_id,
            still_isolated_ranges=encode(self._core.still_isolated),
            page_size_bytes=PAGE_BYTES,
            chunk_order=facts.chunk_order,
            isolator=self._isolator.name,
            tracker=facts.tracker,
            agent_version=__version__,
        )


def _why_ended(tasks: Iterable[asyncio.Task[None]]) -> grpc.RpcError | None:
    """Return the error that the host ended the stream with; a bug in one of the tasks is raised."""
    why = None
    for task in tasks:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, grpc.RpcError):
            why = error
        elif error is not None:
            raise error
    return why

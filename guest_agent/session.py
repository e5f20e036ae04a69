"""The guest's end of its hinting sessions: gRPC outside, `HintingCore` inside.

The core and the isolator are used on one event loop only. The isolator's wake callback, the
stream's reader and a timer put events into an inbox, and one task handles them. A stream that has
ended is opened again after a pause, which grows up to 2 s until there is a Welcome. The agent ends
if the host refuses it for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import grpc
from grpc import aio

from guest_agent import hinting
from guest_agent.holding_back import HoldingBack
from guest_agent.isolation.isolator import HeldPages, Isolator, UsedPages, nothing_held_back
from guest_agent.resting import Resting
from guest_agent.stream_end import refusal, why_ended
from guest_agent.telemetry import TELEMETRY_PERIOD_S, MemoryUseOf, TelemetryPace
from hintfleet import __version__
from hintfleet.errors import InvalidInput
from hintfleet.logs import LogRateLimit, fields
from hintfleet.ranges import decode, encode
from hintfleet.settings import SHORTEST_REPORT_PERIOD_MS
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

# The pause between two polls while a settle request waits for its answer.
_SETTLING_PERIOD_S = 0.02
_SHORTEST_RECONNECT_PAUSE_S, _LONGEST_RECONNECT_PAUSE_S = 0.05, 2.0
_ACK_POLL_S = 0.01

# If the host skipped a batch for one of these reasons, its ranges are hinted again. After
# OUTSIDE_RAM or HOST_ERROR they are not: the host would most likely skip them each time, for ever.
_SKIPPED_FOR_NOW = frozenset({pb.STALE, pb.WRONG_EPOCH})


@dataclass(frozen=True, kw_only=True)
class HelloFacts:
    """What the maker of a `HintingSession` must supply. All but the last are fields of Hello.

    :ivar most_memory_bytes: the guest's memory, with all that can be plugged.
    """

    identity: pb.Identity
    boot_id: str
    chunk_order: int
    tracker: str
    most_memory_bytes: int


class _Event(Enum):
    """An event in the inbox that is not a message from the host."""

    WAKE = auto()
    """The isolator may have chunks."""
    TICK = auto()
    """A period has passed, and there is work."""
    ENDED = auto()
    """The stream has ended."""


_Call = aio.StreamStreamCall[Any, Any]

_log = logging.getLogger("hintfleet.guest.session")


class HintingSession:
    """Holds a guest's hinting sessions with its host agent, one after the other. Owns the isolator,
    which `__init__` starts and `run` closes."""

    def __init__(
        self,
        channel: aio.Channel,
        isolator: Isolator,
        facts: HelloFacts,
        free_bytes: Callable[[], int],
        memory_use: MemoryUseOf,
    ) -> None:
        """Start the isolator. Must be called on the event loop that will run the session.

        :param free_bytes: return the guest's free memory; called once per second at the most.
        :param memory_use: called only for a message of telemetry.
        :raises Refused, TransientError: the isolator cannot work here, or not now.
        """
        # The channel is an asyncio one because gRPC's threaded client wakes up ten times a second
        # for each open stream, and needs four times as much CPU time at rest.
        self._stub = HintingServiceStub(channel)
        self._isolator = isolator
        self._facts = facts
        self._holding_back = HoldingBack(
            facts.most_memory_bytes // PAGE_BYTES, 1 << facts.chunk_order
        )
        self._telemetry = TelemetryPace(free_bytes, memory_use, isolator, self._holding_back)
        self._period_s = 1.0
        self._policy_kind = pb.Policy.KIND_UNSPECIFIED
        self._resting = Resting()
        self._refusals = LogRateLimit()
        self._epoch = 0
        """The epoch of this session; 0 until the Welcome."""
        self._knows_resident = False
        """Whether the host has sent this session's first list, of all that is resident."""
        self._inbox: asyncio.Queue[pb.HostMessage | _Event | Exception] = asyncio.Queue()
        self._outbox: asyncio.Queue[pb.GuestMessage] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._next_tick = loop.call_later(0, int)
        self._next_tick.cancel()  # only a placeholder: `_loop` schedules the first tick

        def wake() -> None:
            # The isolator calls `wake` from its own thread or from the workload's thread.
            loop.call_soon_threadsafe(self._inbox.put_nowait, _Event.WAKE)

        self._core = hinting.HintingCore(isolator.start(wake, self._held_back_pages))

    async def run(self) -> None:
        """Hold sessions until cancelled, then close the isolator. Isolated ranges stay isolated.

        :raises HintfleetError: the host refuses this guest for good. The isolator is closed then,
            too.
        """
        reconnect_pause_s = _SHORTEST_RECONNECT_PAUSE_S
        try:
            while True:
                self._epoch = 0
                error = await self._run_once()
                self._log_end(error)
                if refused := refusal(error):
                    raise refused
                if self._epoch:  # there was a Welcome: connect again soon
                    reconnect_pause_s = _SHORTEST_RECONNECT_PAUSE_S
                # Random, so that after a restart of the host agent not all guests connect at once.
                await asyncio.sleep(reconnect_pause_s * random.uniform(0.5, 1))
                reconnect_pause_s = min(2 * reconnect_pause_s, _LONGEST_RECONNECT_PAUSE_S)
        finally:
            self._isolator.close()

    async def finish(self) -> None:
        """Begin no new batch, and return when the core has released all ranges. (A batch that the
        kernel module has, and that this agent has not read, may still be isolated.)

        If a part of a batch of the kernel module is in flight, the rest of that batch is still
        hinted. Waits for all acks (or a new Welcome), so for ever if there is no host agent.
        `run` must be running until `finish` returns.
        """
        self._core.stop()
        while self._core.still_isolated:
            await asyncio.sleep(_ACK_POLL_S)
        self._isolator.idle()  # ends a pass of hugetlb, which returns its chunks to the guest

    async def _run_once(self) -> grpc.RpcError | None:
        """Run one stream; return the gRPC error that ended it, None if something else ended it."""
        # New ones: in the old inbox there may be the end of the stream before.
        self._inbox, self._outbox = asyncio.Queue(), asyncio.Queue()
        self._outbox.put_nowait(pb.GuestMessage(hello=self._hello()))
        # Without wait_for_ready, a call that begins while gRPC pauses between two attempts to
        # connect fails at once (grpc: doc/wait-for-ready.md).
        call: _Call = self._stub.Session(wait_for_ready=True)  # type: ignore[call-arg]
        tasks = [asyncio.create_task(work(call)) for work in (self._read, self._write)]
        try:
            await self._loop()
        except (hinting.ProtocolViolation, InvalidInput) as violation:
            # A broken protocol does not end the agent: a restarted host agent may follow the
            # protocol, and without an agent the guest's memory would never be hinted again.
            _log.error("host agent broke the protocol", extra=fields(reason=violation))
        finally:
            self._core.lost()
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.wait(tasks)
        return why_ended(tasks)

    def _log_end(self, error: grpc.RpcError | None) -> None:
        reason = error.details() if error is not None else "closed by either side"
        if self._epoch:
            _log.info("session ended", extra=fields(epoch=self._epoch, reason=reason))
        elif (more := self._refusals.due()) is not None:
            _log.warning("no session", extra=fields(reason=reason, **more))

    async def _read(self, call: _Call) -> None:
        try:
            async for message in call:
                self._inbox.put_nowait(message)
        finally:
            self._inbox.put_nowait(_Event.ENDED)

    async def _write(self, call: _Call) -> None:
        # Errors of a stream that has ended are ignored here, because `_read` reports the end.
        # Writing to such a stream raises asyncio.InvalidStateError (grpc/aio/_call.py).
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outbox.get())

    async def _loop(self) -> None:
        """Handle events until the stream ends. An exception in the inbox is raised."""
        self._schedule_tick()
        try:
            while (event := await self._inbox.get()) is not _Event.ENDED:
                was_resting = self._resting.period_s > 0
                if isinstance(event, Exception):
                    raise event
                if event is _Event.TICK:
                    self._carry_out(self._core.period_passed(isolator_idle=self._isolator.idle()))
                elif isinstance(event, pb.HostMessage):
                    self._carry_out(self._handle_message(event))
                elif self._isolator.enough_ready():
                    self._carry_out(self._core.ready())
                if self._core.settling:
                    self._resting.end()
                # A settle request, a wake or the end of a rest may make the next tick due earlier.
                if self._core.settling or event is _Event.WAKE or was_resting:
                    self._schedule_tick()
        finally:
            self._next_tick.cancel()

    def _held_back_pages(self, used: UsedPages | None) -> HeldPages:
        """Note how much memory is in use, if that is known. Return how much to hold back now: all
        while nothing may be hinted, else nothing while a settle request waits."""
        now_s = time.monotonic()
        if used is not None:
            self._resting.used(used)
            self._holding_back.observe(now_s, used.now, used.peak)
        if not self._core.may_send:
            # So that no isolator makes chunks ready: the kernel module would take 32 blocks out of
            # the guest, again and again, and give them back a second later.
            return HeldPages(self._facts.most_memory_bytes // PAGE_BYTES, 0)
        if self._core.settling:
            return nothing_held_back(used)
        return HeldPages(
            self._holding_back.held_back_pages(now_s), self._holding_back.would_hold_pages()
        )

    def _schedule_tick(self) -> None:
        """Schedule the next tick, unless one is due earlier."""
        # A planned tick is never put off: each wake calls this function, so otherwise a guest that
        # frees memory all the time would never have a tick, and never send telemetry.
        loop = asyncio.get_running_loop()
        at_s = loop.time() + self._tick_pause_s()
        if self._next_tick.cancelled() or at_s < self._next_tick.when():
            self._next_tick.cancel()
            self._next_tick = loop.call_at(at_s, self._period_passed)

    def _tick_pause_s(self) -> float:
        polled = self._isolator.must_be_polled
        if self._core.settling:
            return _SETTLING_PERIOD_S
        if not polled and not self._isolator.idle():
            return self._period_s
        if self._resting.period_s:
            return max(self._period_s, self._resting.period_s)
        return self._period_s if polled else TELEMETRY_PERIOD_S

    def _period_passed(self) -> None:
        try:
            self._poll()
        except Exception as error:  # noqa: BLE001 - `_loop` raises it
            # asyncio would only log an error that this timer's callback raises, and no further tick
            # would be scheduled: the agent would look alive, but hint nothing.
            self._inbox.put_nowait(error)

    def _poll(self) -> None:
        """Put TICK into the inbox if there is work, schedule the next poll, send telemetry if due.

        In an idle guest there is mostly no work: then the task in `_loop` is not woken.
        """
        # Else `_schedule_tick` would take this tick, which is over, for one that is still planned.
        self._next_tick.cancel()
        if self._core.settling or not self._isolator.idle():
            self._inbox.put_nowait(_Event.TICK)
        self._resting.polled()
        self._schedule_tick()
        self._send_telemetry()

    def _send_telemetry(self) -> None:
        if self._core.state is hinting.State.OPEN:
            telemetry = self._telemetry.if_due(time.monotonic(), self._core.acknowledged_page_count)
            if telemetry is not None:
                self._outbox.put_nowait(pb.GuestMessage(telemetry=telemetry))

    def _handle_message(self, message: pb.HostMessage) -> Sequence[hinting.Instruction]:
        kind = message.WhichOneof("message")
        if kind == "ack":
            ack = message.ack
            acted = not any(skipped.reason in _SKIPPED_FOR_NOW for skipped in ack.skipped)
            return self._core.acknowledged(ack.epoch, ack.seq, acted=acted)
        if kind == "welcome":
            welcome = message.welcome
            self._epoch = welcome.epoch
            self._knows_resident = False
            _log.info("session welcomed", extra=fields(epoch=welcome.epoch))
            self._apply_policy(welcome.policy)
            instructions = self._core.welcomed(
                welcome.epoch,
                hinting.Limits(
                    ranges_per_batch=welcome.limits.ranges_per_batch,
                    pages_per_batch=welcome.limits.pages_per_batch,
                    batches_in_flight=welcome.limits.batches_in_flight,
                ),
            )
            self._telemetry.begin()
            self._send_telemetry()
            return instructions
        if kind == "settle":
            return self._core.settle_requested(message.settle.request_id)
        if kind == "refaulted":
            ranges = decode(message.refaulted.ranges)
            self._resting.moved(ranges.page_count)
            # First observe what is in use now: the levels that came into use explain most of what
            # has refaulted, and only the rest makes the guest hold back more.
            self._held_back_pages(self._isolator.used_pages())
            if self._knows_resident:
                self._holding_back.refaulted(time.monotonic(), ranges.page_count)
            self._knows_resident = True
            self._isolator.refaulted(ranges)
        elif kind == "policy":
            return self._apply_policy(message.policy)
        return []

    def _apply_policy(self, policy: pb.Policy) -> Sequence[hinting.Instruction]:
        period_s = max(SHORTEST_REPORT_PERIOD_MS, policy.report_period_ms) / 1000
        if (policy.kind, period_s) != (self._policy_kind, self._period_s):
            self._resting.end()
        self._policy_kind, self._period_s = policy.kind, period_s
        hold_ms = {pb.Policy.COLD: policy.cold_after_ms, pb.Policy.ADAPTIVE: policy.break_even_ms}
        self._holding_back.set_policy(
            hold_ms.get(policy.kind, 0) / 1000,
            learns=policy.kind != pb.Policy.COLD,
            report_period_s=period_s,
        )
        might_send = self._core.may_send
        bounded = policy.kind == pb.Policy.PRESSURE
        instructions = self._core.allowed(policy.allowance_pages if bounded else None)
        if self._core.may_send and not might_send:
            self._resting.end()
        return instructions

    def _carry_out(self, instructions: Sequence[hinting.Instruction]) -> None:
        todo = deque(instructions)
        while todo:
            todo.extend(self._carry_out_one(todo.popleft()))

    def _carry_out_one(self, instruction: hinting.Instruction) -> Sequence[hinting.Instruction]:
        match instruction:
            case hinting.Isolate(max_ranges, max_pages):
                ranges = self._isolator.isolate(max_ranges, max_pages)
                self._resting.moved(ranges.page_count)
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

"""The guest's end of a hinting session: gRPC outside, `HintingCore` inside.

One thread runs the core and touches the isolator; gRPC's reader thread and the
isolator's wake callback only put events into its inbox. A lost link is tried
again, with a growing pause, for as long as the agent lives.
"""

from __future__ import annotations

import queue
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread

import grpc

from guest_agent import hinting
from guest_agent.isolation import Isolator
from guest_agent.procfs import own_rss_bytes
from hintfleet import __version__
from hintfleet.errors import from_rpc_error
from hintfleet.ranges import decode, encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub

_SETTLING_PERIOD_S = 0.02
_TELEMETRY_PERIOD_S = 1.0
_LONGEST_SILENCE_S = 10.0
_NEWS_BYTES = 1 << 20
_LONGEST_PAUSE_S = 2.0

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


class _Wake:
    """Inbox event: the isolator may have something."""


@dataclass(frozen=True)
class _Ended:
    """Inbox event: the stream with this outbox ended."""

    outbox: queue.SimpleQueue[pb.GuestMessage | None]
    error: grpc.RpcError | None


_Inbox = queue.SimpleQueue[pb.HostMessage | _Wake | _Ended]


class HintingSession:
    """Keeps one guest in session with its host agent. Owns the isolator."""

    def __init__(
        self,
        channel: grpc.Channel,
        isolator: Isolator,
        facts: HelloFacts,
        free_bytes: Callable[[], int],
    ) -> None:
        """Start the isolator.

        :param free_bytes: the guest's free memory, asked every second at the most.
        :raises Refused: the isolator cannot work here.
        """
        self._stub = HintingServiceStub(channel)
        self._isolator = isolator
        self._facts = facts
        self._free_bytes = free_bytes
        self._told_free_bytes = -_NEWS_BYTES
        self._told_at_s = 0.0
        self._inbox: _Inbox = queue.SimpleQueue()
        self._stopping = Event()
        self._core = hinting.HintingCore(isolator.start(lambda: self._inbox.put(_Wake())))
        self._outbox: queue.SimpleQueue[pb.GuestMessage | None] = queue.SimpleQueue()
        self._period_s = 1.0

    def run(self) -> None:
        """Hold sessions until `stop`.

        :raises HintfleetError: the host refused this agent for good; what was
            isolated stays isolated.
        """
        pause_s = 0.05
        try:
            while not self._stopping.is_set():
                started_s = time.monotonic()
                error = self._run_once()
                if self._stopping.is_set():
                    return
                if error is not None and error.code() in _FINAL_CODES:
                    raise from_rpc_error(error, "the host agent ended the hinting session")
                if time.monotonic() - started_s > 1:
                    pause_s = 0.05
                self._stopping.wait(pause_s * random.uniform(0.5, 1))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._isolator.close()

    def stop(self) -> None:
        """End the session; `run` returns soon after. May be called from any thread."""
        self._stopping.set()
        self._outbox.put(None)
        self._inbox.put(_Ended(self._outbox, None))

    def _run_once(self) -> grpc.RpcError | None:
        outbox = self._outbox = queue.SimpleQueue()
        outbox.put(pb.GuestMessage(hello=self._hello()))
        call = self._stub.Session(_until_none(outbox), wait_for_ready=True)
        reader = Thread(target=self._read, args=(call, outbox), name="session-reader")
        reader.start()
        try:
            ended = self._loop(outbox)
        finally:
            self._core.lost()
            outbox.put(None)
            call.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs
            reader.join()
        return ended

    def _read(
        self,
        call: Iterator[pb.HostMessage],
        outbox: queue.SimpleQueue[pb.GuestMessage | None],
    ) -> None:
        error = None
        try:
            for message in call:
                self._inbox.put(message)
        except grpc.RpcError as caught:
            error = caught
        self._inbox.put(_Ended(outbox, error))

    def _loop(self, outbox: queue.SimpleQueue[pb.GuestMessage | None]) -> grpc.RpcError | None:
        """Deal with events until this stream ends; the reason it ended with."""
        now_s = time.monotonic()
        next_period_s, next_telemetry_s = now_s + self._period_s, now_s
        while True:
            period_s = _SETTLING_PERIOD_S if self._core.settling else self._period_s
            next_period_s = min(next_period_s, time.monotonic() + period_s)
            try:
                event = self._inbox.get(timeout=max(0.0, next_period_s - time.monotonic()))
            except queue.Empty:
                next_period_s = time.monotonic() + period_s
                self._carry_out(self._core.period_passed(isolator_idle=self._isolator.idle()))
                if time.monotonic() >= next_telemetry_s:
                    next_telemetry_s = time.monotonic() + _TELEMETRY_PERIOD_S
                    self._tell_news()
                continue
            if isinstance(event, _Ended):
                if event.outbox is outbox:
                    return event.error
            elif isinstance(event, _Wake):
                self._carry_out(self._core.ready())
            else:
                self._carry_out(self._heard(event))

    def _tell_news(self) -> None:
        """Telemetry, if free memory has changed, or nothing was said for long: an idle
        guest's agent must cost next to nothing."""
        if self._core.state is not hinting.State.OPEN:
            return
        free_bytes = self._free_bytes()
        silent_s = time.monotonic() - self._told_at_s
        if abs(free_bytes - self._told_free_bytes) < _NEWS_BYTES and silent_s < _LONGEST_SILENCE_S:
            return
        self._told_free_bytes, self._told_at_s = free_bytes, time.monotonic()
        telemetry = pb.Telemetry(
            agent_cpu_us=time.process_time_ns() // 1000,
            agent_rss_bytes=own_rss_bytes(),
            tracker_bytes=self._isolator.tracker_bytes(),
            free_bytes=free_bytes,
        )
        self._outbox.put(pb.GuestMessage(telemetry=telemetry))

    def _heard(self, message: pb.HostMessage) -> Sequence[hinting.Instruction]:
        kind = message.WhichOneof("message")
        if kind == "ack":
            ack = message.ack
            acted = not any(skipped.reason in _SKIPPED_FOR_NOW for skipped in ack.skipped)
            return self._core.acknowledged(ack.epoch, ack.seq, acted=acted)
        if kind == "welcome":
            welcome = message.welcome
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
            self._isolator.used_again(decode(message.refaulted.ranges))
        elif kind == "policy":
            return self._obey(message.policy)
        return []

    def _obey(self, policy: pb.Policy) -> Sequence[hinting.Instruction]:
        self._period_s = max(0.01, policy.report_period_ms / 1000)
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
                idle = bool(ranges) or self._isolator.idle()
                return self._core.isolated(ranges, isolator_idle=idle)
            case hinting.Send(epoch, seq, ranges):
                batch = pb.Batch(epoch=epoch, seq=seq, ranges=encode(ranges))
                self._outbox.put(pb.GuestMessage(batch=batch))
            case hinting.Release(ranges, hinted):
                self._isolator.release(ranges, hinted=hinted)
            case hinting.ReportNow():
                self._isolator.report_now()
            case hinting.SendSettled():
                settled = pb.Settled(
                    request_id=instruction.request_id,
                    batches=instruction.batches,
                    hinted_pages=instruction.hinted_pages,
                )
                self._outbox.put(pb.GuestMessage(settled=settled))
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


def _until_none(
    outbox: queue.SimpleQueue[pb.GuestMessage | None],
) -> Iterator[pb.GuestMessage]:
    while (message := outbox.get()) is not None:
        yield message

"""The door for guests: the hinting protocol and the workload stream over gRPC.

A guest is untrusted: what it sends is checked against the gate's limits, and a
violation ends its own session with the reason, nobody else's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TypeVar

from hintfleet.errors import HintfleetError, InvalidInput
from hintfleet.ranges import RangeSet, decode, encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceServicer
from host_agent.edge import Context, abort, ended_by
from host_agent.gate import LIMITS
from host_agent.guest import Guest, Stream
from host_agent.pressure import policy_of
from host_agent.reclaim import Outcome
from host_agent.registry import Registry

_FIRST_MESSAGE_S = 10.0
_M = TypeVar("_M")


class GuestService(HintingServiceServicer):
    """Serves the guests of one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def Session(
        self, request_iterator: AsyncIterator[pb.GuestMessage], context: Context
    ) -> AsyncIterator[pb.HostMessage]:
        """One hinting session; see hinting.proto."""
        try:
            hello = (await _first(request_iterator, "hello")).hello
            guest = self._registry.authenticate(hello.identity)
            _check_hello(hello)
            stream = Stream()
            epoch = await guest.take_over_hinting(stream, self._registry.epochs)
            try:
                yield pb.HostMessage(
                    welcome=pb.Welcome(
                        epoch=epoch, policy=policy_of(guest.spec.hinting), limits=LIMITS
                    )
                )
                async with (
                    ended_by(stream, _Receiver(guest, stream).read(request_iterator)),
                    ended_by(stream, _tell_refaults(guest)),
                ):
                    while (message := await stream.next()) is not None:
                        yield message  # type: ignore[misc]
            finally:
                guest.leave_hinting(stream)
        except HintfleetError as error:
            await abort(context, error)

    async def Workload(
        self, request_iterator: AsyncIterator[pb.WorkloadEvent], context: Context
    ) -> AsyncIterator[pb.WorkloadCommand]:
        """Commands for the guest's workload; see hinting.proto."""
        try:
            attach = (await _first(request_iterator, "attach")).attach
            guest = self._registry.authenticate(attach.identity)
            stream = Stream()
            guest.attach_workload(stream)
            try:
                async with ended_by(stream, _read_done(guest, request_iterator)):
                    while (message := await stream.next()) is not None:
                        yield message  # type: ignore[misc]
            finally:
                guest.leave_workload(stream)
        except HintfleetError as error:
            await abort(context, error)


class _Receiver:
    """What a session's guest says, dealt with in order; batches run one after the other."""

    def __init__(self, guest: Guest, stream: Stream) -> None:
        self._guest = guest
        self._stream = stream
        self._waiting: asyncio.Queue[tuple[pb.Batch, RangeSet, float]] = asyncio.Queue()
        self._in_flight = 0

    async def read(self, messages: AsyncIterator[pb.GuestMessage]) -> None:
        worker = asyncio.create_task(self._run_batches())
        try:
            async for message in messages:
                if worker.done():
                    break
                self._heard(message)
        finally:
            worker.cancel()
            await asyncio.wait([worker])
        if not worker.cancelled() and (error := worker.exception()):
            raise error

    def _heard(self, message: pb.GuestMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "batch":
            self._admit(message.batch)
        elif kind == "settled":
            self._guest.answer(message.settled.request_id, message.settled)
        elif kind == "telemetry":
            self._guest.telemetry = message.telemetry
        else:
            raise InvalidInput(f"a session cannot carry {kind or 'an empty message'} here")

    def _admit(self, batch: pb.Batch) -> None:
        if self._in_flight == LIMITS.batches_in_flight:
            raise InvalidInput(f"more than {LIMITS.batches_in_flight} batches in flight")
        hinted = decode(batch.ranges, LIMITS.ranges_per_batch)
        self._guest.gate.check(batch, hinted)
        self._in_flight += 1
        self._waiting.put_nowait((batch, hinted, time.monotonic()))

    async def _run_batches(self) -> None:
        while True:
            batch, hinted, received_s = await self._waiting.get()
            outcome = await self._guest.run_batch(
                batch.epoch, hinted, received_s, len(batch.ranges)
            )
            self._in_flight -= 1
            self._stream.send(pb.HostMessage(ack=ack_of(batch, outcome)))


async def _read_done(guest: Guest, events: AsyncIterator[pb.WorkloadEvent]) -> None:
    async for event in events:
        if event.WhichOneof("event") != "done":
            raise InvalidInput("a workload stream carries only done after attach")
        guest.answer(event.done.command_id, event.done)


async def _first(messages: AsyncIterator[_M], kind: str) -> _M:
    """The first message of a stream, which must be of this kind and come soon."""
    try:
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            first = await anext(messages)
    except (TimeoutError, StopAsyncIteration):
        raise InvalidInput(f"the stream did not begin with {kind}") from None
    if not first.HasField(kind):  # type: ignore[attr-defined]
        raise InvalidInput(f"the stream did not begin with {kind}")
    return first


def _check_hello(hello: pb.Hello) -> None:
    if hello.page_size_bytes != PAGE_BYTES:
        raise InvalidInput(
            f"the guest's pages have {hello.page_size_bytes} bytes, this host's {PAGE_BYTES}"
        )
    decode(hello.still_isolated_ranges)


async def _tell_refaults(guest: Guest) -> None:
    """Host-guided hinting: audit once per period, and say what was used again."""
    period_s = policy_of(guest.spec.hinting).report_period_ms / 1000
    while True:
        await asyncio.sleep(period_s)
        await guest.tell_refaults()


def ack_of(batch: pb.Batch, outcome: Outcome) -> pb.Ack:
    """What became of a batch, for the guest."""
    return pb.Ack(
        epoch=batch.epoch,
        seq=batch.seq,
        reclaimed_bytes=outcome.reclaimed.page_count * PAGE_BYTES,
        absent_bytes=outcome.absent.page_count * PAGE_BYTES,
        skipped=[
            pb.Skipped(reason=reason, ranges=encode(ranges))
            for reason, ranges in outcome.skipped.items()
        ],
    )

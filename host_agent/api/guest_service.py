"""The guests' service: the hinting protocol and the workload stream over gRPC.

A guest is untrusted. What it sends is checked against the gate's limits, against what is possible
(`validation`) and against its rate limits (`rate_limits`). Messages beyond the rate limits are only
read more slowly; messages other than batches count as a flood after some seconds of that. A flood,
like any other violation, ends the stream on which it arrived, with the reason, and is counted for
the guest if the guest has authenticated itself. Other guests are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from hintfleet.errors import HintfleetError, InvalidInput, LimitExceeded, Refused, TransientError
from hintfleet.logs import LogRateLimit, fields
from hintfleet.net.tls import Role, check_role
from hintfleet.ranges import decode
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceServicer
from host_agent.api.grpc_calls import Context, abort, ended_by, force_close, received
from host_agent.api.resident_parts import resident_parts
from host_agent.guest import Guest
from host_agent.registry import Registry
from host_agent.session.gate import LIMITS, Batch
from host_agent.session.pending_streams import PendingStreams
from host_agent.session.stream import Stream
from host_agent.session.validation import check_done, check_hello, check_settled, check_telemetry

_FIRST_MESSAGE_S = 10.0
_MAX_PENDING_STREAMS = 256
# A stream is refused only after this pause, so that a client which retries for ever costs little.
_REFUSAL_S = 0.5
_UUID_LENGTH = 36
_M = TypeVar("_M")

_log = logging.getLogger("hintfleet.host.api")


class GuestService(HintingServiceServicer):
    """Serves the guests of one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._pending_streams = PendingStreams(_MAX_PENDING_STREAMS, _FIRST_MESSAGE_S)
        self._refusals = LogRateLimit()

    async def Session(
        self, request_iterator: AsyncIterator[pb.GuestMessage], context: Context
    ) -> AsyncIterator[pb.HostMessage]:
        """Serve one hinting session; see hinting.proto."""
        messages = received(request_iterator)
        try:
            hello = (await self._first(messages, "hello")).hello
            guest = await self._authenticated(hello.identity, context)
            with _counting_violations(guest), _stream(guest, context) as stream:
                check_hello(hello)
                session = guest.sessions.connect_hinting(
                    stream, self._registry.epochs, hello.boot_id
                )
                try:
                    welcome = await stream.next()
                    # Save the epoch before the Welcome is sent: the next host agent must choose a
                    # later epoch (I2), even if this host agent is killed right after the Welcome.
                    try:
                        await guest.saver.save(guest)
                    except HintfleetError as error:
                        stream.end(error)  # so that nobody says the guest has closed it
                        raise
                    yield welcome  # type: ignore[misc]
                    async with ended_by(stream, _read_session(guest, session, messages)):
                        while (message := await stream.next()) is not None:
                            yield message  # type: ignore[misc]
                finally:
                    guest.sessions.leave_hinting(session)
        except HintfleetError as error:
            await abort(context, error)

    async def Workload(
        self, request_iterator: AsyncIterator[pb.WorkloadEvent], context: Context
    ) -> AsyncIterator[pb.WorkloadCommand]:
        """Send commands to the guest's workload and receive its answers; see hinting.proto."""
        events = received(request_iterator)
        try:
            attach = (await self._first(events, "attach")).attach
            guest = await self._authenticated(attach.identity, context)
            with _counting_violations(guest), _stream(guest, context) as stream:
                guest.sessions.attach_workload(stream)
                try:
                    async with ended_by(stream, _read_done(guest, events)):
                        while (message := await stream.next()) is not None:
                            yield message  # type: ignore[misc]
                finally:
                    guest.sessions.leave_workload(stream)
        except HintfleetError as error:
            await abort(context, error)

    async def _first(self, messages: AsyncIterator[_M], kind: str) -> _M:
        """Wait for the first message of a stream and return it.

        :raises TransientError: it did not arrive in time, or too many other streams were pending.
        :raises InvalidInput: it is not a valid message of kind `kind`, or the stream ended before.
        """
        try:
            async with self._pending_streams.place():
                first = await anext(messages)
        # Transient, so that the guest's agent tries again: the cause may be a slow link, or too
        # many streams of others.
        except TimeoutError:
            raise TransientError(
                f"no {kind} came within {_FIRST_MESSAGE_S:.0f} s, or too many streams wait"
                " for their first message"
            ) from None
        except StopAsyncIteration:
            raise InvalidInput(f"the stream did not begin with {kind}") from None
        if not first.HasField(kind):  # type: ignore[attr-defined]
            raise InvalidInput(f"the stream did not begin with {kind}")
        return first

    async def _authenticated(self, identity: pb.Identity, context: Context) -> Guest:
        """Return the guest with this identity, and count the stream for its rate limit. The token
        must be right, and under TLS the certificate, too.

        :raises HintfleetError: no guest on this host has this UUID and token, the certificate is
            wrong, or the guest may not open a stream now. Raised after a pause.
        """
        try:
            peer = check_role(context.auth_context(), Role.GUEST)
            # Before a message quotes it: anybody can send a long one, and to quote 250 KiB takes
            # 20 ms of the event loop.
            if len(identity.guest_uuid) > _UUID_LENGTH:
                raise Refused("a guest's UUID is not so long")
            if peer is not None and peer.guest_uuid != identity.guest_uuid:
                raise Refused(f"the certificate is not for guest {identity.guest_uuid}")
            guest = self._registry.authenticate(identity)
            # `running` alone does not tell whether the door is plugged in: a guest that waits to be
            # attached again keeps `running` while libvirt does not answer.
            if guest.to_attach_again or (guest.is_attached and guest.running is None):
                raise TransientError(f"guest {guest.name}: its memory door is not plugged in now")
            guest.sessions.conduct.check_may_open(time.monotonic())
        except HintfleetError as error:
            if (left_out := self._refusals.due()) is not None:
                about = {"uuid": identity.guest_uuid[:_UUID_LENGTH], "reason": error.message}
                _log.warning("stream refused", extra=fields(**about, **left_out))
            # During the pause, the refused stream takes one of the limited places for pending
            # streams. If another stream needs the place, the pause ends early, with TimeoutError.
            with contextlib.suppress(TimeoutError):
                async with self._pending_streams.place():
                    await asyncio.sleep(_REFUSAL_S)
            raise
        return guest


def _stream(guest: Guest, context: Context) -> Stream:
    return Stream(lambda error: force_close(context, error), guest.sessions.conduct.count_stream())


@contextlib.contextmanager
def _counting_violations(guest: Guest) -> Iterator[None]:
    """Count an InvalidInput or LimitExceeded of the block as a violation; raise it again."""
    try:
        yield
    except (InvalidInput, LimitExceeded) as error:
        guest.misbehaved(error)
        raise


async def _read_session(
    guest: Guest, session: int, messages: AsyncIterator[pb.GuestMessage]
) -> None:
    async for message in _paced(guest, messages):
        kind = message.WhichOneof("message")
        if kind == "batch":
            guest.sessions.batch_arrived(session, _received(message.batch))
        elif kind == "settled":
            check_settled(message.settled)
            guest.sessions.answer(message.settled.request_id, message.settled)
        elif kind == "telemetry":
            check_telemetry(message.telemetry, guest.largest_memory_bytes)
            guest.sessions.telemetry = message.telemetry
            guest.sessions.telemetry_at_s = time.monotonic()
            books = guest.memory.books_now()
            guest.sessions.resident_parts = resident_parts(books, message.telemetry)
        else:
            raise InvalidInput(f"{kind or 'an empty message'} is not allowed after hello")


async def _paced(guest: Guest, messages: AsyncIterator[_M]) -> AsyncIterator[_M]:
    """Yield messages, but read them only as fast as the guest's rate limits allow.

    :raises LimitExceeded: for longer than FLOOD_S, the guest has sent messages besides batches so
        fast that each had to be delayed. Batches are only delayed.
    """
    # Messages that are not read yet fill the stream's window (64 KiB). Then gRPC's flow control
    # makes the guest wait. So a flood costs little memory and time here.
    async for message in messages:
        now_s = time.monotonic()
        if isinstance(message, pb.GuestMessage) and message.HasField("batch"):
            wait_s = guest.sessions.conduct.count_batch(len(message.batch.ranges), now_s)
        else:
            wait_s = guest.sessions.conduct.count_message(now_s)
        yield message
        if wait_s:
            await asyncio.sleep(wait_s)


def _received(batch: pb.Batch) -> Batch:
    return Batch(
        epoch=batch.epoch,
        seq=batch.seq,
        ranges=decode(batch.ranges, LIMITS.ranges_per_batch),
        received_s=time.monotonic(),
        wire_bytes=len(batch.ranges),
    )


async def _read_done(guest: Guest, events: AsyncIterator[pb.WorkloadEvent]) -> None:
    async for event in _paced(guest, events):
        if event.WhichOneof("event") != "done":
            raise InvalidInput("only done is allowed after attach")
        check_done(event.done, guest.largest_memory_bytes)
        guest.sessions.answer(event.done.command_id, event.done)

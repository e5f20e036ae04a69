"""Clients that act as a guest: one replays a connection, one acts as a second agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from hintfleet.net.channels import open_aio_channel
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from tests.support.relay import Address

# RFC 9113: the client's preface, and the header of a frame.
_PREFACE_BYTES = 24
_FRAME_HEADER_BYTES = 9
_DATA = 0
# gRPC over HTTP/2 puts a flag and a length before each message.
_MESSAGE_HEADER_BYTES = 5


def hello_in(recorded: bytes) -> pb.Hello | None:
    """Return the first Hello among the bytes that a guest sent on a connection; None if there is
    none."""
    for payload in _data_frames(recorded):
        # An Attach of the workload's stream parses as a Hello, too: it has the same first two
        # fields. Only a real Hello has a page size.
        with contextlib.suppress(DecodeError):
            message = pb.GuestMessage.FromString(payload[_MESSAGE_HEADER_BYTES:])
            if message.HasField("hello") and message.hello.page_size_bytes:
                return message.hello
    return None


def _data_frames(recorded: bytes) -> Iterator[bytes]:
    at = _PREFACE_BYTES
    while at + _FRAME_HEADER_BYTES <= len(recorded):
        length = int.from_bytes(recorded[at : at + 3])
        kind = recorded[at + 3]
        at += _FRAME_HEADER_BYTES
        if kind == _DATA:
            yield recorded[at : at + length]
        at += length


async def replay(to: Address, said: bytes, hold_s: float) -> None:
    """Send, on a new connection, the bytes that a guest has sent before; read answers for `hold_s`,
    or until the host closes the connection.

    :raises ConnectionError: nobody listens at `to`, or the host reset the connection.
    """
    reader, writer = await asyncio.open_connection(to.host, to.port)
    try:
        writer.write(said)
        async with asyncio.timeout(hold_s):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        pass
    finally:
        writer.transport.abort()


async def pretend(to: Address, hello: pb.Hello, hold_s: float) -> None:
    """Send a Hello as a second agent would, and keep the session open for `hold_s`.

    :raises grpc.RpcError: the session ended earlier: the host refused the Hello, began another
        session of the guest, or died.
    """
    async with open_aio_channel(
        str(to), options=(("grpc.use_local_subchannel_pool", 1),)
    ) as channel:
        call = HintingServiceStub(channel).Session(timeout=hold_s)  # type: ignore[call-arg]
        try:
            await call.write(pb.GuestMessage(hello=hello))
            async for _ in call:
                pass
        except asyncio.InvalidStateError:  # the call ended before the Hello was written
            pass
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise

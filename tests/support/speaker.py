"""A fake guest agent: sends the messages that a test chooses to a host agent."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from hintfleet.net.channels import open_channel
from hintfleet.ranges import RangeSet, encode
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from tests.support.agents import HANG_S


class Speaker:
    """A hinting session: sends messages one by one to a host agent's address for guests."""

    def __init__(self, address: str) -> None:
        options = (
            # Each speaker gets its own connection, as different guests have.
            ("grpc.use_local_subchannel_pool", 1),
            # Have gRPC keep its window for unread bytes small: if the test reads nothing, the host
            # agent can soon send nothing more.
            ("grpc.http2.bdp_probe", 0),
        )
        self.channel = open_channel(address, options=options)
        self.outbox: queue.SimpleQueue[pb.GuestMessage | None] = queue.SimpleQueue()
        self.call = HintingServiceStub(self.channel).Session(self.messages(), timeout=HANG_S)

    def messages(self) -> Iterator[pb.GuestMessage]:
        while (message := self.outbox.get()) is not None:
            yield message

    def hello(self, uuid: str, token: str, **other: Any) -> None:
        fields: dict[str, Any] = {"page_size_bytes": 4096, "chunk_order": 9} | other
        identity = pb.Identity(guest_uuid=uuid, token=token)
        self.outbox.put(pb.GuestMessage(hello=pb.Hello(identity=identity, **fields)))

    def batch(self, epoch: int, seq: int, ranges: RangeSet) -> None:
        batch = pb.Batch(epoch=epoch, seq=seq, ranges=encode(ranges))
        self.outbox.put(pb.GuestMessage(batch=batch))

    def next(self) -> pb.HostMessage:
        return next(iter(self.call))

    def ack(self) -> pb.Ack:
        """Return the next ack. Skip reports of refaults, which may come at any time."""
        while (message := self.next()).WhichOneof("message") == "refaulted":
            pass
        assert message.WhichOneof("message") == "ack", message
        return message.ack

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        """Return the status and the text with which the host ended the session."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        return caught.value.code(), str(caught.value.details())

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()
        self.channel.close()

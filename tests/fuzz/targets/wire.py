"""Any bytes in place of messages, sent over gRPC to a host agent's service for guests, with rate
limits off.

Each input is one call of a method, which may not exist, with any frames. The call must end with a
documented status. Another guest, which has a real agent, must keep its memory and its session: this
is checked after the first of every 256 inputs, and at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from hintfleet.net.channels import open_channel
from hintfleet.ranges import RangeSet, encode
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from tests.fuzz.source import Source
from tests.fuzz.target import Target, TryInput
from tests.support.agents import InProcessHost, host_in_process, wait_until
from tests.support.no_rate_limits import no_rate_limits

_SERVICE = "/hintfleet.v1.HintingService/"
_METHODS = ("Session", "Workload", "Nothing")
_DEADLINE_S = 20.0
_NEIGHBOUR_EVERY = 256
_HELD_BYTES = 16 * MIB

_ENDINGS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
}


class _GuestService:
    """A host agent's service for guests, to which one guest sends bytes."""

    def __init__(self, host: InProcessHost, channel: grpc.Channel) -> None:
        self._host = host
        self._channel = channel
        self._calls = 0
        uuid = host.create("g", method=host_pb2.NONE).uuid
        self._identity = pb.Identity(guest_uuid=uuid, token=host.token("g"))
        host.create("neighbour")

    def try_input(self, data: bytes) -> None:
        source = Source(data)
        method = _SERVICE + _METHODS[source.number() % 8 % len(_METHODS)]
        frames = list(self._frames(source))
        call = self._channel.stream_stream(method, None, None)(iter(frames), timeout=_DEADLINE_S)
        with contextlib.suppress(grpc.RpcError):  # the call's status is checked below
            for _ in call:
                pass
        assert call.code() in _ENDINGS, (call.code(), call.details())
        self._calls += 1
        if self._calls % _NEIGHBOUR_EVERY == 1:
            self.neighbour_goes_on()

    def _frames(self, source: Source) -> Iterator[bytes]:
        while source.more:
            match source.number() % 8:
                case 0 | 1:
                    hello = pb.Hello(identity=self._identity, page_size_bytes=PAGE_BYTES)
                    yield pb.GuestMessage(hello=hello).SerializeToString() + source.short()
                case 2:
                    attach = pb.Attach(identity=self._identity)
                    yield pb.WorkloadEvent(attach=attach).SerializeToString() + source.short()
                case 3 | 4:
                    ranges = RangeSet([(source.number() << 7, source.number())])
                    batch = pb.Batch(epoch=source.number(), seq=1, ranges=encode(ranges))
                    yield pb.GuestMessage(batch=batch).SerializeToString()
                case _:
                    yield source.short()

    def neighbour_goes_on(self) -> None:
        """Have the neighbour use memory, verify its contents, free it and settle; check that the
        contents are right, and that the books balance."""
        host = self._host
        host.allocate(_HELD_BYTES, "neighbour")
        assert host.verify("neighbour").wrong_pages == 0
        host.free(_HELD_BYTES, "neighbour")
        host.settle("neighbour")
        wait_until(self._balances, "the neighbour's books to balance")

    def _balances(self) -> bool:
        books = self._host.guests()["neighbour"].ledger
        return (
            books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
            == books.provisioned_bytes
        )


@contextmanager
def _opened() -> Iterator[TryInput]:
    with no_rate_limits(), host_in_process() as host:
        watch = host.watch(timeout_s=24 * 3600)
        with open_channel(host.guest_address) as channel:
            service = _GuestService(host, channel)
            yield service.try_input
            service.neighbour_goes_on()
        watch.cancel()


TARGET = Target(
    opened=_opened,
    seeds=(
        b"\0\0\0\3\0\1\0\5\4\x12\2\x08\1",
        b"\1\2\0\5\2\x12\0",
        b"\0\5\3abc",
        b"\2\5\1x",
    ),
    max_bytes=512,
    quick_runs=600,
)

"""A host that sends a Welcome on each Session stream at once, and then nothing more. Idle clients
and agents that are measured keep their streams open to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import grpc

from hintfleet.v1 import hinting_pb2 as pb
from host_agent.session.gate import LIMITS

PERIOD_S = 0.2


@contextlib.contextmanager
def silent_host() -> Iterator[int]:
    """Serve on a port of loopback, and yield the port; a real guest reaches it at 10.0.2.2."""
    ended = Event()
    policy = pb.Policy(report_period_ms=int(1000 * PERIOD_S))
    welcome = pb.HostMessage(welcome=pb.Welcome(epoch=1, policy=policy, limits=LIMITS))

    def session(*_: object) -> Iterator[pb.HostMessage]:
        yield welcome
        ended.wait()

    handler = grpc.stream_stream_rpc_method_handler(
        session, response_serializer=pb.HostMessage.SerializeToString
    )
    service = pb.DESCRIPTOR.services_by_name["HintingService"].full_name
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"Session": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        ended.set()
        server.stop(grace=1).wait()

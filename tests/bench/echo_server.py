"""A bare aio server of the hinting protocol: it welcomes every guest, and acknowledges each batch
at once without reclaiming anything.

    python -m tests.bench.echo_server
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import (
    HintingServiceServicer,
    add_HintingServiceServicer_to_server,
)
from host_agent.server import GUEST_OPTIONS


class Echo(HintingServiceServicer):
    """Answers each Hello and each Batch, and ignores all other messages."""

    async def Session(  # noqa: N802 - the generated name
        self, request_iterator: AsyncIterator[pb.GuestMessage], context: Any
    ) -> AsyncIterator[pb.HostMessage]:
        """Yield a Welcome for a Hello, and an Ack for each batch."""
        async for message in request_iterator:
            if message.HasField("hello"):
                yield pb.HostMessage(welcome=pb.Welcome(epoch=1))
            elif message.HasField("batch"):
                yield pb.HostMessage(ack=pb.Ack(epoch=1, seq=message.batch.seq))

    async def Workload(  # noqa: N802 - the generated name
        self, request_iterator: AsyncIterator[pb.WorkloadEvent], context: Any
    ) -> AsyncIterator[pb.WorkloadCommand]:
        """End the stream at its first event. The yield only makes this an async generator."""
        async for _ in request_iterator:
            break
        return
        yield pb.WorkloadCommand()


async def main() -> None:
    """Print the address on stdout, then serve until stdin ends."""
    server = aio.server(options=GUEST_OPTIONS)
    add_HintingServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())

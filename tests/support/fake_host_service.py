"""Many fake host agents in one process: each is a gRPC server at a unix socket that answers some
calls of the control API. Their guests are numbers only.

As a program, it prints `serving` when all listen. Then it prints `step` each time that as many more
steps are done as there are guests on all hosts. It serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2, host_pb2_grpc


class _Host(host_pb2_grpc.HostServiceServicer):
    def __init__(
        self, name: str, step_done: Callable[[], None], sampling: Callable[[], bool]
    ) -> None:
        self._name = name
        self._step_done = step_done
        self._sampling = sampling
        self._guests: dict[str, host_pb2.Ledger] = {}

    async def GetHost(self, request: host_pb2.GetHostRequest, _: Any) -> host_pb2.Host:
        states = [host_pb2.DriverState(driver=d, usable=True) for d in request.drivers]
        return host_pb2.Host(name=self._name, memory_budget_bytes=1 << 40, drivers=states)

    async def CreateGuest(self, request: host_pb2.CreateGuestRequest, _: Any) -> host_pb2.Guest:
        books = host_pb2.Ledger(provisioned_bytes=request.spec.memory_bytes)
        self._guests[request.name] = books
        return host_pb2.Guest(name=request.name, ledger=books)

    async def DestroyGuest(
        self, request: host_pb2.DestroyGuestRequest, _: Any
    ) -> host_pb2.DestroyGuestResponse:
        return host_pb2.DestroyGuestResponse(ledger=self._guests.pop(request.name))

    async def RunStep(self, request: host_pb2.RunStepRequest, _: Any) -> host_pb2.RunStepResponse:
        books = self._guests[request.guest_name]
        books.resident_bytes += request.allocate_bytes - request.free_bytes
        pages = books.resident_bytes // PAGE_BYTES if request.verify else 0
        self._step_done()
        return host_pb2.RunStepResponse(
            changed_bytes=request.allocate_bytes or request.free_bytes,
            held_bytes=books.resident_bytes,
            verified_pages=pages,
            duration_us=1000,
            done_at_unix_us=time.time_ns() // 1000,
        )

    async def Watch(
        self, request: host_pb2.WatchRequest, _: Any
    ) -> AsyncIterator[host_pb2.SampleSet]:
        number = 0
        due_s = time.monotonic()
        while True:
            number += 1
            for books in self._guests.values():
                books.batches += 1  # the sample's number: a gap is one not sent, or lost
            if self._sampling():
                yield host_pb2.SampleSet(
                    at_unix_us=time.time_ns() // 1000,
                    samples=[
                        host_pb2.Sample(guest_name=name, ledger=books)
                        for name, books in self._guests.items()
                    ],
                    host_agent_cpu_us=number,
                )
            due_s += request.period_ms / 1000
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))


async def start(
    address: str,
    step_done: Callable[[], None] = lambda: None,
    sampling: Callable[[], bool] = lambda: True,
) -> grpc.aio.Server:
    """Start a fake host agent at a unix socket; return its server.

    :param sampling: asked before each sample set, which is not sent if it returns False.
    """
    server = grpc.aio.server()
    host = _Host(address, step_done, sampling)  # type: ignore[abstract]
    host_pb2_grpc.add_HostServiceServicer_to_server(host, server)
    server.add_insecure_port(address)
    await server.start()
    return server


async def main(folder: str, first: int, hosts: int, guests_per_host: int) -> None:
    """Serve `hosts` fake host agents at unix:FOLDER/N, N from `first` on, until stdin ends."""
    done = itertools.count(1)

    def step_done() -> None:
        if next(done) % (hosts * guests_per_host) == 0:
            print("step", flush=True)

    addresses = [f"unix:{folder}/{number}" for number in range(first, first + hosts)]
    servers = [await start(address, step_done) for address in addresses]
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(server.stop(None) for server in servers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))

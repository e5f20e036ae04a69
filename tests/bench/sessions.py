"""Measure thousands of idle sessions: the CPU time and memory that they cost a host agent, and the
latency of an ack while they are open. CPU time and latency are compared with those of a bare aio
server that has as many streams (echo_server.py)."""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from grpc import aio

from hintfleet.ranges import RangeSet, encode
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from tests.bench.flood import cpu_s, process
from tests.bench.report import Figure, side_by_side

_REST_S = 30.0
_ROUNDS = 6
_ACKS_A_ROUND = 400
_PAUSE_S = 0.005
_BATCH = encode(RangeSet([(0, 512)]))


def idle_sessions(count: int) -> Iterator[Figure]:
    """Yield the CPU time of a host agent with `count` idle sessions, the memory that each of them
    takes, and two percentiles of latency: of the host agent's ack / of the bare server's."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        host = stack.enter_context(process("tests.bench.flood_host", str(count + 1)))
        echo = stack.enter_context(process("tests.bench.echo_server"))
        said = json.loads(cast(IO[str], host.stdout).readline())
        echo_address = cast(IO[str], echo.stdout).readline().strip()
        before_bytes = _rss_bytes(host.pid)
        measured = asyncio.run(_measure(said, echo_address, host, echo))
    what = f"{count} idle sessions"
    share, echo_share, held_bytes, pairs = measured
    yield Figure(
        name=f"host agent with {what} / bare aio server with as many streams",
        unit="% of a core",
        ours=100 * share,
        other=100 * echo_share,
        wanted="ours <= 10",
    )
    yield Figure(
        name=f"memory of a session, of {what}",
        unit="MiB",
        ours=(held_bytes - before_bytes) / (count + 1) / MIB,  # + 1: the active session
    )
    for name, percent, wanted in (("p50", 50, ""), ("p99", 99, "<= 1.25")):
        values = [(_percentile(ack, percent), _percentile(bare, percent)) for ack, bare in pairs]
        yield side_by_side(
            f"latency of an ack among {what} / of an echo, {name}", "ms", values, wanted
        )


_Measured = tuple[float, float, int, list[tuple[list[float], list[float]]]]


async def _measure(
    said: dict[str, Any],
    echo_address: str,
    host: subprocess.Popen[str],
    echo: subprocess.Popen[str],
) -> _Measured:
    *idle, active = said["guests"]
    holders = [_Stream(said["address"], guest) for guest in idle]
    echoes = [_Stream(echo_address, guest) for guest in idle]
    acked, echoed = _Stream(said["address"], active), _Stream(echo_address, active)
    for stream in (*holders, *echoes, acked, echoed):
        await stream.open()
    held_bytes = _rss_bytes(host.pid)
    started_s, spent = time.monotonic(), (cpu_s(host.pid), cpu_s(echo.pid))
    await asyncio.sleep(_REST_S)
    elapsed_s = time.monotonic() - started_s
    share, echo_share = (
        (cpu_s(p.pid) - s) / elapsed_s for p, s in zip((host, echo), spent, strict=True)
    )
    pairs = []
    for number in range(_ROUNDS + 1):
        first, second = (acked, echoed) if number % 2 else (echoed, acked)
        seen = {id(stream): await stream.latencies_s() for stream in (first, second)}
        if number:  # round 0 only warms up
            pairs.append((seen[id(acked)], seen[id(echoed)]))
    for stream in (*holders, *echoes, acked, echoed):
        await stream.close()
    return share, echo_share, held_bytes, pairs


class _Stream:
    """A session of a guest; only `latencies_s` sends batches."""

    def __init__(self, address: str, guest: dict[str, str]) -> None:
        self._guest = guest
        self._seq = 0
        # Real guests have one connection each; without this option gRPC would share one.
        self._channel = aio.insecure_channel(
            address, options=(("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        )

    async def open(self) -> None:
        """Begin the session: send Hello, and wait for the Welcome."""
        stub: Any = HintingServiceStub(self._channel)
        self._call = stub.Session()
        identity = pb.Identity(guest_uuid=self._guest["uuid"], token=self._guest["token"])
        hello = pb.Hello(identity=identity, page_size_bytes=PAGE_BYTES, chunk_order=9)
        await self._call.write(pb.GuestMessage(hello=hello))
        self._epoch = (await self._call.read()).welcome.epoch

    async def latencies_s(self) -> list[float]:
        """Send _ACKS_A_ROUND batches, one after the other; return their latencies. No memory in
        them is resident, so that nothing is punched."""
        return [await self._hint() for _ in range(_ACKS_A_ROUND)]

    async def _hint(self) -> float:
        await asyncio.sleep(_PAUSE_S)
        self._seq += 1
        batch = pb.Batch(epoch=self._epoch, seq=self._seq, ranges=_BATCH)
        started_s = time.perf_counter()
        await self._call.write(pb.GuestMessage(batch=batch))
        while not (await self._call.read()).HasField("ack"):
            pass
        return time.perf_counter() - started_s

    async def close(self) -> None:
        """End the session."""
        self._call.cancel()
        await self._channel.close(None)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] * 1000


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES

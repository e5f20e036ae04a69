"""Measure what one hostile guest costs a host agent with 256 other guests, its neighbours: their
ack latency and the host agent's CPU time, while the hostile guest is active and while it pauses.
Other work on the machine disturbs the CPU time less than the latency.

Three processes run: a host agent (flood_host.py), this one, which acts for all neighbours at a
steady pace, and the hostile guest, a Flooder or a Shredder (flooder.py). Phases in which it is
active and phases in which it pauses alternate within one run.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from hintfleet.net.channels import open_aio_channel
from hintfleet.ranges import RangeSet, encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from tests.bench.report import Figure, side_by_side

_NEIGHBOURS = 256
_PERIOD_S = 0.5
_PHASE_S = 3.0
"""Too short for a violation: the host ends a longer flood, which would improve the figures."""
_REST_S = 0.2
"""Time after a flood for messages that are still on their way. In a phase without flood, the burst
of the flooder's rate limit fills up again."""
_ROUNDS = 8
_CHUNK_PAGES = 512
_CHUNKS = range(0, 8, 2)


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """The measurements of one phase.

    :ivar latencies_s: the ack latencies of all neighbours.
    :ivar cpu_share: CPU time of the host agent, as a share of one core.
    """

    latencies_s: list[float]
    cpu_share: float

    def latency_ms(self, percent: int) -> float:
        return statistics.quantiles(self.latencies_s, n=100)[percent - 1] * 1000


class _Neighbour:
    """A guest that writes to one page of each of its _CHUNKS, hints these chunks in one batch, and
    repeats that."""

    def __init__(self, address: str, guest: dict[str, str]) -> None:
        # Real guests have one connection each; without this option gRPC would share one.
        self._channel = open_aio_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self._guest = guest
        self._ram = os.open(guest["ram"], os.O_RDWR)
        self._ranges = encode(RangeSet((n * _CHUNK_PAGES, _CHUNK_PAGES) for n in _CHUNKS))
        self.latencies_s: list[float] = []

    async def open(self) -> None:
        """Begin the session: send Hello, and wait for the Welcome."""
        self._call: Any = HintingServiceStub(self._channel).Session()  # type: ignore[call-arg]
        identity = pb.Identity(guest_uuid=self._guest["uuid"], token=self._guest["token"])
        hello = pb.Hello(identity=identity, page_size_bytes=PAGE_BYTES, chunk_order=9)
        await self._call.write(pb.GuestMessage(hello=hello))
        self._epoch = (await self._read()).welcome.epoch
        self._seq = 0

    async def run(self, offset_s: float) -> None:
        """Send a batch each _PERIOD_S until cancelled, the first one after `offset_s`. After an ack
        that took longer than a period, send without a pause until the batches are on time again."""
        next_s = time.monotonic() + offset_s
        while True:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            next_s += _PERIOD_S
            self.latencies_s.append(await self._hint())

    async def _hint(self) -> float:
        for chunk in _CHUNKS:
            os.pwrite(self._ram, b"\1", chunk * _CHUNK_PAGES * PAGE_BYTES)
        self._seq += 1
        batch = pb.Batch(epoch=self._epoch, seq=self._seq, ranges=self._ranges)
        started_s = time.perf_counter()
        await self._call.write(pb.GuestMessage(batch=batch))
        message = await self._read()
        while not message.HasField("ack"):
            message = await self._read()
        elapsed_s = time.perf_counter() - started_s
        ack = message.ack
        late = [skipped.reason for skipped in ack.skipped] == [pb.STALE]
        if not late and ack.reclaimed_bytes != len(_CHUNKS) * PAGE_BYTES:
            raise RuntimeError(f"the host did not reclaim what was hinted: {ack}")
        return elapsed_s

    async def _read(self) -> pb.HostMessage:
        message: pb.HostMessage = await self._call.read()
        return message

    async def close(self) -> None:
        """End the session."""
        self._call.cancel()
        os.close(self._ram)
        await self._channel.close(None)


def run() -> Iterator[Figure]:
    """Yield CPU time, median and 99th percentile of ack latency, while the hostile guest is
    active / while it pauses, for each kind of hostile guest."""
    yield from _beside("floods")
    yield from _beside("shreds")


def _beside(kind: str) -> Iterator[Figure]:
    with ExitStack() as stack:
        host = stack.enter_context(process("tests.bench.flood_host", str(_NEIGHBOURS + 1)))
        said = json.loads(cast(IO[str], host.stdout).readline())
        *neighbours, hostile = said["guests"]
        arguments = (said["address"], kind, json.dumps(hostile))
        flooder = stack.enter_context(process("tests.bench.flooder", *arguments))
        rounds = asyncio.run(_measure(said["address"], neighbours, flooder, host.pid))
    yield side_by_side(
        f"host agent with {_NEIGHBOURS} guests, one {kind} / none",
        "CPU s per s",
        [(flood.cpu_share, calm.cpu_share) for flood, calm in rounds],
    )
    for name, percent, wanted in (("p50", 50, ""), ("p99", 99, "<= 1.5")):
        pairs = [(flood.latency_ms(percent), calm.latency_ms(percent)) for flood, calm in rounds]
        what = f"ack latency of {_NEIGHBOURS} guests, {name}, one {kind} / none"
        yield side_by_side(what, "ms", pairs, wanted)


async def _measure(
    address: str, guests: list[dict[str, str]], flooder: subprocess.Popen[str], host_pid: int
) -> list[tuple[_Phase, _Phase]]:
    """Return a pair of phases for each round: the one in which the hostile guest was active, and
    the one before it, in which it paused."""
    neighbours = [_Neighbour(address, guest) for guest in guests]
    for neighbour in neighbours:
        await neighbour.open()
    running = [
        asyncio.create_task(one.run(n * _PERIOD_S / len(neighbours)))
        for n, one in enumerate(neighbours)
    ]
    try:
        await _phase(neighbours, host_pid)  # to warm up: not in the figures
        rounds = []
        for _ in range(_ROUNDS):
            calm = await _phase(neighbours, host_pid)
            _tell(flooder, "on")
            flood = await _phase(neighbours, host_pid)
            _tell(flooder, "off")
            await asyncio.sleep(_REST_S)
            rounds.append((flood, calm))
    finally:
        for task in running:
            task.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error
    for neighbour in neighbours:
        await neighbour.close()
    if flooder.poll() is not None:
        raise RuntimeError("the flooder has ended: the host dropped its guest")
    return rounds


async def _phase(neighbours: list[_Neighbour], host_pid: int) -> _Phase:
    for neighbour in neighbours:
        neighbour.latencies_s.clear()
    started_s, before_s = time.monotonic(), cpu_s(host_pid)
    await asyncio.sleep(_PHASE_S)
    return _Phase(
        latencies_s=[latency_s for one in neighbours for latency_s in one.latencies_s],
        cpu_share=(cpu_s(host_pid) - before_s) / (time.monotonic() - started_s),
    )


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in s."""
    # The clock id that clock_getcpuclockid(3) would return.
    return time.clock_gettime(~pid << 3 | 2)


def _tell(process: subprocess.Popen[str], word: str) -> None:
    stdin = cast(IO[str], process.stdin)
    stdin.write(word + "\n")
    stdin.flush()


@contextmanager
def process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module that ends when its stdin is closed; at the end of the block, close that stdin,
    and wait for the process.

    :raises subprocess.TimeoutExpired: it still runs 30 s later.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.communicate(timeout=30)

"""The guest's side of a session, with a fake host agent that each test controls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import pytest
from grpc import aio

from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.session import HelloFacts, HintingSession
from hintfleet.ranges import RangeSet, encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1.hinting_pb2_grpc import (
    HintingServiceServicer,
    add_HintingServiceServicer_to_server,
)
from tests.support.agents import HANG_S

CHUNK_COUNT = 64
LIMITS = pb.Limits(ranges_per_batch=8, pages_per_batch=1 << 20, batches_in_flight=2)


class ScriptedHost(HintingServiceServicer):
    """Welcomes every guest, and acknowledges each batch.

    :ivar withhold_acks: while set, batches are not acknowledged.
    :ivar violate_in: the sessions, by number from 1, in which the host acknowledges a batch that
        the guest has not sent.
    :ivar say: sends a message to the guest, in the latest session.
    """

    def __init__(self) -> None:
        self.sessions = 0
        self.batches: list[pb.Batch] = []
        self.telemetry_count = 0
        self.withhold_acks = asyncio.Event()
        self.violate_in: set[int] = set()
        self.report_period_ms = 10
        self.say: Callable[[pb.HostMessage], Awaitable[None]]

    # The stubs declare a handler that yields answers. grpc.aio also accepts one that writes them.
    async def Session(  # type: ignore[override]  # noqa: N802 - gRPC's
        self,
        requests: AsyncIterator[pb.GuestMessage],
        context: aio.ServicerContext[pb.GuestMessage, pb.HostMessage],
    ) -> None:
        self.say = context.write
        self.sessions += 1
        epoch = self.sessions
        async for message in requests:
            if message.HasField("hello"):
                policy = pb.Policy(kind=pb.Policy.EAGER, report_period_ms=self.report_period_ms)
                welcome = pb.Welcome(epoch=epoch, limits=LIMITS, policy=policy)
                await self.say(pb.HostMessage(welcome=welcome))
                if epoch in self.violate_in:
                    await self.say(pb.HostMessage(ack=pb.Ack(epoch=epoch, seq=99)))
            elif message.HasField("telemetry"):
                self.telemetry_count += 1
            elif message.HasField("batch"):
                self.batches.append(message.batch)
                while self.withhold_acks.is_set():
                    await asyncio.sleep(0.01)
                await self.say(pb.HostMessage(ack=pb.Ack(epoch=epoch, seq=message.batch.seq)))


class CountingIsolator(EmbeddedIsolator):
    """Counts in `looks` the calls of `idle`. In a polled session, a poll that finds no work
    makes one, and so does an Isolate that finds no chunk."""

    looks = 0

    def idle(self) -> bool:
        self.looks += 1
        return super().idle()


class Guest(NamedTuple):
    session: HintingSession
    allocator: BuddyAllocator
    isolator: CountingIsolator


@contextlib.asynccontextmanager
async def in_session(host: ScriptedHost, *, polled: bool = False) -> AsyncIterator[Guest]:
    server = aio.server()
    add_HintingServiceServicer_to_server(host, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    zone = ZoneSpec(name="Normal", present=RangeSet([(0, CHUNK_COUNT * 512)]))
    allocator = BuddyAllocator([zone], chunk_order=9)
    facts = HelloFacts(
        identity=pb.Identity(),
        boot_id="boot",
        chunk_order=9,
        tracker="bitmap",
        most_memory_bytes=CHUNK_COUNT * 512 * PAGE_BYTES,
    )
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        isolator = CountingIsolator(allocator, threshold_chunks=1)
        isolator.must_be_polled = polled
        session = HintingSession(
            channel,
            isolator,
            facts,
            lambda: allocator.free_page_count * PAGE_BYTES,
            allocator.memory_use,
        )
        for pfn in [allocator.allocate(9) for _ in range(CHUNK_COUNT // 2)]:
            allocator.free(pfn, 9)
        running = asyncio.create_task(session.run())
        try:
            yield Guest(session, allocator, isolator)
            assert not running.done(), running.exception()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.stop(None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.01)


def run(scene: Callable[[ScriptedHost], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(ScriptedHost())  # type: ignore[abstract]  # Workload is never called

    asyncio.run(play())


def test_a_session_with_a_host_that_breaks_the_protocol_ends_and_is_retried() -> None:
    """If the agent gave up after one odd message, the guest would have no agent."""

    async def scene(host: ScriptedHost) -> None:
        host.violate_in = {1, 2}
        async with in_session(host):
            await until(lambda: host.sessions == 3 and len(host.batches) > 0)

    run(scene)


def test_finish_hints_no_more_and_waits_for_acks() -> None:
    async def scene(host: ScriptedHost) -> None:
        host.withhold_acks.set()
        async with in_session(host) as (session, allocator, _):
            await until(lambda: len(host.batches) == 1)
            before = allocator.free_page_count
            assert before < CHUNK_COUNT * 512, "some chunks are isolated"
            finishing = asyncio.create_task(session.finish())
            await asyncio.sleep(0.2)
            assert not finishing.done(), "a batch is in flight"
            host.withhold_acks.clear()
            await asyncio.wait_for(finishing, HANG_S)
            assert allocator.free_page_count == CHUNK_COUNT * 512
            sent = len(host.batches)
            await asyncio.sleep(0.2)
            assert len(host.batches) == sent <= LIMITS.batches_in_flight

    run(scene)


def test_an_agent_stays_at_rest_while_almost_nothing_happens() -> None:
    """An idle guest, too, uses and frees a chunk from time to time. An agent that polled at its
    shortest period after each of these events would never rest."""

    async def scene(host: ScriptedHost) -> None:
        host.report_period_ms = 100
        async with in_session(host, polled=True) as (_, allocator, isolator):

            async def used(chunks: int) -> None:
                ranges = encode(RangeSet([(0, chunks * 512)]))
                await host.say(pb.HostMessage(refaulted=pb.Refaulted(ranges=ranges)))

            async def freed() -> None:
                batches = len(host.batches)
                allocator.free(allocator.allocate(9), 9)
                await until(lambda: len(host.batches) > batches)

            async def looks_while(act: Callable[[], Awaitable[None]]) -> int:
                before = isolator.looks
                for _ in range(5):
                    await act()
                    await asyncio.sleep(0.4)
                return isolator.looks - before

            async with asyncio.timeout(HANG_S):
                while await looks_while(lambda: asyncio.sleep(0)) > 4:
                    pass
            assert await looks_while(lambda: used(1)) <= 4, "of twenty"
            assert await looks_while(freed) <= 4 + 5 * 2, "two for each batch that is sought"
            assert await looks_while(lambda: used(4)) > 10

    run(scene)


def test_a_guest_that_frees_all_the_time_sends_telemetry() -> None:
    async def scene(host: ScriptedHost) -> None:
        host.report_period_ms = 200
        async with in_session(host) as (_, allocator, _):
            for _ in range(50):
                pfn = allocator.allocate(9)
                await asyncio.sleep(0.05)
                allocator.free(pfn, 9)
            assert host.telemetry_count

    run(scene)


def test_a_poll_that_fails_ends_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the agent did not end, it would look healthy, but never hint again."""

    async def scene(host: ScriptedHost) -> None:
        def fail(_: CountingIsolator) -> bool:
            raise KeyError("missing")

        async with in_session(host) as (_, _, isolator):
            await until(lambda: len(host.batches) > 0)
            monkeypatch.setattr(type(isolator), "idle", fail)
            (agent,) = (task for task in asyncio.all_tasks() if "Session.run" in repr(task))
            await until(agent.done)

    with pytest.raises(AssertionError, match="missing"):
        run(scene)

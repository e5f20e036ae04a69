"""The guest's side of a session, with a fake host agent that each test controls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import grpc
import pytest
from grpc import aio

from guest_agent import agent
from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.session import HelloFacts, HintingSession
from hintfleet.errors import ExitCode, HintfleetError
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
    :ivar refuse_with: the code with which the host refuses each guest; None: it refuses none.
    :ivar violate_in: the sessions, by number from 1, in which the host acknowledges a batch that
        the guest has not sent.
    :ivar say: sends a message to the guest, in the latest session.
    """

    def __init__(self) -> None:
        self.sessions = 0
        self.batches: list[pb.Batch] = []
        self.telemetry_count = 0
        self.refuse_with: grpc.StatusCode | None = None
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
            if self.refuse_with is not None:
                await context.abort(self.refuse_with, "not you")
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
            await asyncio.sleep(0.2)
            assert host.sessions == 3, "a new session does not see the end of the one before"

    run(scene)


def test_no_chunk_counts_as_ready_while_none_may_be_hinted() -> None:
    """Else the kernel module takes up to 128 MiB out of the guest, again and again, for nothing."""

    async def scene(host: ScriptedHost) -> None:
        async with in_session(host) as (session, allocator, isolator):
            assert isolator.idle(), "there is no session yet"
            await until(lambda: len(host.batches) > 0 and isolator.idle())
            paused = pb.Policy(kind=pb.Policy.PRESSURE, allowance_pages=0, report_period_ms=10)
            await host.say(pb.HostMessage(policy=paused))
            await until(lambda: not session._core.may_send)
            sent = len(host.batches)
            for pfn in [allocator.allocate(9) for _ in range(8)]:
                allocator.free(pfn, 9)
            assert isolator.idle(), "nothing may be hinted"
            await asyncio.sleep(0.2)
            assert len(host.batches) == sent
            eager = pb.Policy(kind=pb.Policy.EAGER, report_period_ms=10)
            await host.say(pb.HostMessage(policy=eager))
            await until(lambda: len(host.batches) > sent)

    run(scene)


def test_a_host_agent_that_has_just_started_is_told_of_the_guest_at_once() -> None:
    """It knows nothing: not how much is free, which a guest under pressure may give."""

    async def scene(host: ScriptedHost) -> None:
        host.report_period_ms = 1000
        async with in_session(host) as (_, _, isolator):
            await until(lambda: host.telemetry_count > 0 and isolator.idle())
            await asyncio.sleep(0.5)  # the host must have sent all its acks
            before = host.telemetry_count
            await host.say(pb.HostMessage(ack=pb.Ack(epoch=1, seq=99)))  # which ends the session
            await until(lambda: host.sessions == 2)
            await asyncio.sleep(2)
            assert host.telemetry_count > before

    run(scene)


def test_a_guest_that_is_turned_away_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(host: ScriptedHost) -> None:
        host.refuse_with = grpc.StatusCode.UNAVAILABLE
        async with in_session(host):
            await until(lambda: host.sessions == 3)

    run(scene)
    (said,) = [record for record in caplog.records if record.message == "no session"]
    assert vars(said)["hintfleet_fields"]["reason"] == "not you"


def test_what_the_host_does_not_understand_is_no_wrong_usage() -> None:
    """systemd does not start an agent again that ends with the exit code of wrong usage."""

    ended_with: list[BaseException | None] = []

    async def scene(host: ScriptedHost) -> None:
        host.refuse_with = grpc.StatusCode.INVALID_ARGUMENT
        async with in_session(host):
            (agent,) = (task for task in asyncio.all_tasks() if "Session.run" in repr(task))
            await until(agent.done)
            ended_with.append(agent.exception())

    with pytest.raises(AssertionError, match="not you"):
        run(scene)
    (error,) = ended_with
    assert isinstance(error, HintfleetError)
    assert error.exit_code == ExitCode.FAILED


def test_a_host_agent_that_cannot_be_reached_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_TOLD_AFTER_S", 0.2)

    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            address = f"127.0.0.1:{bound.getsockname()[1]}"
        async with aio.insecure_channel(address) as channel:
            channel.get_state(try_to_connect=True)
            reaching = asyncio.create_task(agent._wait_for_link(channel, address))
            await until(lambda: bool(caplog.records))
            assert not reaching.done()
            server = aio.server()
            server.add_insecure_port(address)
            await server.start()
            channel.get_state(try_to_connect=True)
            await asyncio.wait_for(reaching, HANG_S)
            await server.stop(None)

    caplog.set_level("INFO")
    asyncio.run(scene())
    said = ["host agent cannot be reached", "host agent reached"]
    assert [record.message for record in caplog.records] == said


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

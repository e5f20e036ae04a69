"""A guest and its host agent recover when the link between them breaks or delays messages. Guests
connect to the address that is advertised."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2 import Loop
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.relay import Address, Link, Relay


@dataclass(kw_only=True)
class BrokenLink:
    """A host agent with one guest that connects through a relay, and the relay's event loop."""

    host: HostAgent
    relay: Relay
    loop: asyncio.AbstractEventLoop

    def links(self, act: Callable[[Link], None]) -> None:
        """Call a function with every open link, on the relay's event loop; wait for its end."""
        done: Future[None] = Future()

        def run() -> None:
            for link in list(self.relay.links):
                act(link)
            done.set_result(None)

        self.loop.call_soon_threadsafe(run)
        done.result(HANG_S)

    @property
    def epoch(self) -> int:
        return self.host.guests()["g"].epoch


@contextmanager
def relay_in_thread() -> Iterator[tuple[Relay, Address, asyncio.AbstractEventLoop]]:
    relay, loop = Relay(), asyncio.new_event_loop()
    stop, started = asyncio.Event(), Future[Address]()

    async def serve() -> None:
        async with relay.serving() as address:
            started.set_result(address)
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield relay, started.result(HANG_S), loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(HANG_S)
        loop.close()


@pytest.fixture
def broken() -> Iterator[BrokenLink]:
    with (
        relay_in_thread() as (relay, address, loop),
        running_host_agent("--guest-advertise", str(address)) as host,
    ):
        relay.upstream = Address.parse(host.guest_address)
        host.watch()
        host.create()
        yield BrokenLink(host=host, relay=relay, loop=loop)


def test_steps_are_done_once_however_often_the_link_is_cut(broken: BrokenLink) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            step = pool.submit(broken.host.allocate, 16 * MIB)
            broken.links(Link.cut)
            assert step.result(HANG_S).changed_bytes == 16 * MIB
    checked = broken.host.verify()
    assert checked.held_bytes == 80 * MIB
    assert checked.wrong_pages == 0


def test_a_loop_goes_on_while_its_link_is_cut(broken: BrokenLink) -> None:
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(broken.host.loop, Loop.CHURN, size_bytes=16 * MIB, duration_ms=6000)
        for _ in range(2):
            time.sleep(1)
            broken.links(Link.cut)
        done = loop.result(HANG_S)
    assert done.duration_us >= 6_000_000
    assert done.looped.touched_bytes > 0
    assert broken.host.verify().wrong_pages == 0


def test_a_cut_link_is_a_new_epoch_and_what_was_freed_comes_back(broken: BrokenLink) -> None:
    before = broken.epoch
    broken.host.allocate(96 * MIB)
    broken.links(Link.stall)  # no further batch of this session arrives
    broken.links(Link.cut)
    wait_until(lambda: broken.epoch > before, "the next session")
    broken.host.free(64 * MIB)
    assert broken.host.settle().ledger.resident_bytes == 32 * MIB
    assert broken.host.verify().wrong_pages == 0


def test_a_hello_that_comes_late_ends_the_session_but_not_the_agent(broken: BrokenLink) -> None:
    """A network may deliver a Hello after its agent has given up the connection."""
    host, upstream = broken.host, broken.relay.upstream
    host.allocate(96 * MIB)
    host.free(96 * MIB)
    host.settle()
    assert upstream is not None
    # Take the longest recording: others may be of attempts to connect that the agent gave up.
    said = max((bytes(link.recorded) for link in broken.relay.links), key=len)
    host.allocate(96 * MIB)  # the memory that the recorded batches name is now in use
    with socket.create_connection((upstream.host, upstream.port)) as late:
        late.sendall(said)
        skipped = "wrong_epoch"  # of the late session's batches
        wait_until(lambda: skipped in host.guests()["g"].ledger.skipped_total_bytes, skipped)
    assert host.verify().wrong_pages == 0
    host.free(96 * MIB)
    # Only the agent can hint this: it has come again.
    assert host.settle().ledger.resident_bytes == 0


def test_a_link_with_seconds_of_delay_is_slow_and_not_lost(broken: BrokenLink) -> None:
    """Connecting takes several round trips, and each of them takes seconds: as if guest or host had
    almost no CPU time."""
    before = broken.epoch
    broken.relay.delay_s = 1.5
    broken.links(Link.cut)
    wait_until(lambda: broken.epoch > before, "the next session")

    def allocates() -> bool:
        """The workload has a stream of its own, which may open after that of the session."""
        try:
            return broken.host.allocate(16 * MIB).held_bytes == 16 * MIB
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    wait_until(allocates, "its workload")


def test_guests_are_told_the_address_that_is_advertised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        nobody.settimeout(20)
        with (
            running_host_agent("--guest-advertise", f"127.0.0.1:{port}") as host,
            ThreadPoolExecutor(1) as pool,
        ):
            host.watch()
            making = pool.submit(host.create)
            nobody.accept()[0].close()
            destroy = host_pb2.DestroyGuestRequest(name="g")
            host.stub.DestroyGuest(destroy, timeout=HANG_S)
            assert making.exception(HANG_S) is not None

"""A host agent that ends, with a driver that is slow: it makes no guest any more, and leaves
alone the socket of the next host agent. And a trial that ends: its guests are gone before the
next one begins."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hintfleet.errors import TransientError
from hintfleet.net.addresses import socket_path
from hintfleet.v1 import host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceStub
from host_agent.registry import Registry
from host_agent.server import Serving, Settings, serving
from tests.unit.host_agent.test_registry import SPEC, TRIAL, Driver, made


@pytest.fixture
def settings() -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="hf-ending-") as folder:
        yield Settings(
            name="in-process",
            listen=f"unix:{folder}/host.sock",
            guest_listen="127.0.0.1:0",
            memory_budget_bytes=1 << 30,
            libvirt_uri="test:///default",
        )


def use(driver: Driver, served: Serving) -> None:
    """Let this driver make the embedded guests."""
    drivers = served.registry.drivers
    assert isinstance(drivers, dict)
    drivers[host_pb2.EMBEDDED] = driver


def test_no_guest_is_made_while_the_others_are_ended(settings: Settings) -> None:
    async def make_another(registry: Registry, driver: Driver) -> None:
        """Wait until the host agent ends its guest, then ask for another one."""
        (first,) = registry.guests
        while not first.ending:
            await asyncio.sleep(0.01)
        creating = asyncio.create_task(registry.create("late", TRIAL, SPEC))
        await asyncio.wait([creating], timeout=1.0)
        driver.may_end.set()
        with pytest.raises(TransientError, match="this host agent ends"):
            await creating

    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        async with serving(settings) as served:
            use(driver, served)
            served.registry.trials.open_watch(TRIAL)
            await made(served.registry)
            driver.may_end.clear()
            late = asyncio.create_task(make_another(served.registry, driver))
        await late
        assert [guest.closed for guest in driver.made] == [True]

    asyncio.run(scenario())


def test_a_trial_begins_when_the_guests_of_the_one_before_are_gone(settings: Settings) -> None:
    """Their memory would count in it: its host could run out of memory because of them."""

    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        async with (
            serving(settings) as served,
            grpc.aio.insecure_channel(served.control) as channel,
        ):
            use(driver, served)
            served.registry.trials.open_watch(TRIAL)
            await made(served.registry)
            driver.may_end.clear()
            served.registry.trials.close_watch(TRIAL)
            request = host_pb2.WatchRequest(trial_id="the next", period_ms=10)
            watch = HostServiceStub(channel).Watch(request)
            first = asyncio.create_task(watch.read())
            await asyncio.wait([first], timeout=0.5)
            waited = not first.done()
            driver.may_end.set()
            assert waited
            samples = await first
            assert isinstance(samples, host_pb2.SampleSet)
            assert not samples.samples
            assert not served.registry.guests
            watch.cancel()

    asyncio.run(scenario())


class Next(Driver):
    """A driver that is slow to close: meanwhile the next host agent binds its socket."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        super().__init__()
        self._listener, self._path = listener, path

    def close(self) -> None:
        assert not self._path.exists()
        self._listener.bind(os.fspath(self._path))


def test_the_socket_of_the_next_host_agent_stays(settings: Settings) -> None:
    path = socket_path(settings.listen)
    assert path is not None

    async def scenario(listener: socket.socket) -> None:
        async with serving(settings) as served:
            assert path.exists()
            use(Next(listener, path), served)

    with socket.socket(socket.AF_UNIX) as listener:
        asyncio.run(scenario(listener))
    assert path.exists()

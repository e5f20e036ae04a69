"""A fake of a domain that somebody else made and that is attached. There is no libvirt, and a
vhost-user front end in this process acts as QEMU. The registry, the memory door and the RAM are
real."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from hintfleet.errors import GuestLost, HintfleetError, NotFound, Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.api import attaching_again
from host_agent.api.attaching import attach
from host_agent.door.door import MemoryDoor
from host_agent.guest import Guest
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam
from host_agent.persistence.database import Database
from host_agent.registry import Registry
from tests.support.front_end import FrontEnd

SIZE = 4 * MIB
UUID = "3e1b4b5e-6b1f-4c6e-9f0c-0000000000aa"
WAIT_S = 30.0
"""How long a test waits for what must happen."""


class Running:
    """A running domain; a vhost-user front end in this process acts as its QEMU.

    :ivar closed: how often it was closed.
    :ivar close_fails: the error that `close` raises; None: it raises none.
    """

    pid = 0
    domain = "db"
    hypervisor = "libvirt 9.0.0, QEMU 7.2.0, TCG"
    balloon = reporting = None

    def __init__(self, request: GuestRequest, door: MemoryDoor, qemu: FrontEnd) -> None:
        self.request = request
        self.closed = 0
        self.close_fails: HintfleetError | None = None
        self.handle: dict[str, int] = {}
        self.door = door
        self.qemu = qemu
        self.ram = GuestRam(door.segments(), door.fence)

    def plugged(self) -> RangeSet:
        return EMPTY

    def evidence(self) -> str:
        return ""

    def close(self) -> None:
        if self.close_fails is not None:
            raise self.close_fails
        self.closed += 1
        self.qemu.close()
        self.door.close()
        self.ram.close()


def ram_file() -> int:
    """Return a memfd of 4 MiB with one resident page."""
    fd = os.memfd_create("memory-backend-memfd")
    os.pwrite(fd, b"x", 0)
    os.truncate(fd, SIZE)
    return fd


class Driver:
    """Attaches one domain, `db 1`, as a `Running`."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, folder: Path, *obstacles: host_pb2.Obstacle) -> None:
        self.folder = folder
        self.domain = host_pb2.Domain(
            name="db 1", uuid=UUID, running=True, memory_bytes=SIZE, obstacles=obstacles
        )
        self.made: list[Running] = []
        self.refused: int | None = None
        """How often it has refused; None: it does not refuse."""
        self._door_numbers = itertools.count()

    def find(self, name: str) -> host_pb2.Domain:
        if name not in (self.domain.name, UUID):
            raise NotFound("no such domain")
        return self.domain

    def has_ended(self, _uuid: str, _handle: object) -> bool:
        return not self.domain.running

    def runs(self, uuid_text: str) -> bool:
        if self.domain.uuid != uuid_text:
            raise GuestLost("no such domain")
        return self.domain.running

    def create(self, request: GuestRequest) -> Running:
        if self.refused is not None:
            self.refused += 1
            raise Refused("it boots")
        path = self.folder / f"door-{next(self._door_numbers)}"
        door = MemoryDoor.listening(self.loop, path, {os.geteuid()}, request.name)
        qemu = FrontEnd(path)
        qemu.negotiate()
        qemu.add(0, SIZE, ram_file())
        qemu.start()
        assert door.wait_until_open(WAIT_S)
        made = Running(request, door, qemu)
        self.made.append(made)
        door.when_disconnected(request.on_gone)
        return made

    def end(self) -> None:
        """Shut the domain off."""
        self.domain.running = False
        self.made[-1].qemu.close()

    def agent_config(self, request: GuestRequest, server: str) -> str:
        return f"{request.uuid} {request.spec.hinting.isolator} {server}"


class HangsUp(Driver):
    """The domain ends, and the registry is told so, before `create` or `adopt` returns."""

    def create(self, request: GuestRequest) -> Running:
        told = Event()

        def on_gone(reason: str) -> None:
            request.on_gone(reason)
            told.set()

        made = super().create(replace(request, on_gone=on_gone))
        self.end()
        assert told.wait(WAIT_S)
        return made

    def adopt(self, request: GuestRequest, _handle: object) -> Running:
        return self.create(request)


class Booting(Driver):
    """The first attempt to attach the domain succeeds. Each later one waits until the test sets
    `fail`, and then fails."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.fail = Event(), Event()

    def create(self, request: GuestRequest) -> Running:
        if not self.made:
            return super().create(request)
        self.begun.set()
        assert self.fail.wait(WAIT_S)
        raise Refused("it boots")


def run(
    scenario: Callable[[Registry, Any], Coroutine[Any, Any, None]],
    driver: Driver,
    state: Database | None = None,
) -> None:
    """Run a scenario with a registry that attaches guests with `driver`; then end all guests."""

    async def whole() -> None:
        driver.loop = asyncio.get_running_loop()
        registry = Registry({}, state, attached=driver)  # type: ignore[arg-type]
        await scenario(registry, driver)
        await registry.end_all()

    asyncio.run(whole())


def asked(**more: Any) -> host_pb2.AttachGuestRequest:
    """Return a request that attaches the domain `db 1`, and has these other fields."""
    return host_pb2.AttachGuestRequest(domain="db 1", **more)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true, for `WAIT_S` at most."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@contextmanager
def looking_often(registry: Registry, driver: Any) -> Iterator[None]:
    """During the block, look every 10 ms for guests whose domain runs again, and attach them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attaching_again, "_PERIOD_S", 0.01)
        task = asyncio.create_task(attaching_again.attach_when_started(registry, driver))
        try:
            yield
        finally:
            assert not task.done(), task
            task.cancel()


async def attached(registry: Registry, driver: Driver) -> Guest:
    """Attach the domain, and return its guest."""
    await attach(registry, driver, asked())  # type: ignore[arg-type]
    return registry.guests[-1]


async def kept(registry: Registry, driver: Driver) -> Guest:
    """Attach the domain, and shut it off. Return its guest, which waits for the domain to start."""
    guest = await attached(registry, driver)
    driver.end()
    await until(lambda: guest.to_attach_again is not None and guest.running is None)
    return guest


async def reclaim_one_page(guest: Guest) -> None:
    """Reclaim the one page that is resident, and enter it into the books."""
    hinted = RangeSet([(0, 1)])
    guest.memory.post(hinted, await guest.memory.reclaim(hinted), 0)


async def ends_are_dealt_with(registry: Registry) -> None:
    """Wait until the registry has dealt with all ends of domains that it was told of."""
    await asyncio.sleep(0)  # let the event loop tell the registry of all ends
    await asyncio.gather(*registry.leaving)

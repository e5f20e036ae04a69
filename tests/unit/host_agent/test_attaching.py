"""Guests whose domains are somebody else's: kept in no trial, gone when their door is."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from hintfleet.errors import GuestLost, NotFound, Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.api.attaching import attach, detach
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam, Segment
from host_agent.registry import Registry

UUID = "3e1b4b5e-6b1f-4c6e-9f0c-0000000000aa"


class Door:
    """A door whose table changes as a test says. Each region has 1024 pages."""

    def __init__(self, *pfns: int) -> None:
        self.pfns = list(pfns)
        self.table_changed: Callable[[], object] = lambda: None

    def watch(self, moved: Callable[[str | None], None]) -> None:
        moved(None)

    def when_table_changes(self, call: Callable[[], object]) -> None:
        self.table_changed = call

    def pages(self) -> RangeSet:
        return RangeSet((pfn, 1024) for pfn in self.pfns)

    def segments(self, besides: RangeSet = EMPTY) -> list[Segment]:
        new = [pfn for pfn in self.pfns if pfn not in besides]
        return [Segment(pfn=pfn, page_count=1024, fd=ram_file(), offset_bytes=0) for pfn in new]


def ram_file() -> int:
    fd = os.memfd_create("ram")
    os.pwrite(fd, b"x", 0)
    os.truncate(fd, 1024 * PAGE_BYTES)
    return fd


class Running:
    """A domain without QEMU."""

    pid = 0
    balloon = reporting = None
    handle: dict[str, int] = {}

    def __init__(self, request: GuestRequest) -> None:
        self.request = request
        self.closed = 0
        self.door = Door(0)
        self.ram = GuestRam(self.door.segments())

    def evidence(self) -> str:
        return ""

    def close(self) -> None:
        self.closed += 1
        self.ram.close()


class Driver:
    """Attaches domains that are not there."""

    def __init__(self, *obstacles: host_pb2.Obstacle) -> None:
        self.domain = host_pb2.Domain(
            name="db 1", uuid=UUID, running=True, memory_bytes=4 * MIB, obstacles=obstacles
        )
        self.made: list[Running] = []

    def find(self, name: str) -> host_pb2.Domain:
        if name not in (self.domain.name, UUID):
            raise NotFound("no such domain")
        return self.domain

    def create(self, request: GuestRequest) -> Running:
        self.made.append(Running(request))
        return self.made[-1]

    def agent_config(self, request: GuestRequest, server: str) -> str:
        return f"{request.uuid} {request.spec.hinting.isolator} {server}"


class Unwilling(Driver):
    def adopt(self, _request: GuestRequest, _handle: object) -> Running:
        raise GuestLost("it is suspended")


def run(scenario: Callable[[Registry, Any], Any], driver: Driver) -> None:
    async def whole() -> None:
        await scenario(Registry({}, attached=driver), driver)  # type: ignore[arg-type]

    asyncio.run(whole())


def asked(**more: Any) -> host_pb2.AttachGuestRequest:
    return host_pb2.AttachGuestRequest(domain="db 1", **more)


def test_a_dry_run_changes_nothing() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        answer = await attach(registry, driver, asked(dry_run=True))
        assert answer.domain == driver.domain
        assert not answer.HasField("guest")
        assert not registry.guests
        assert not driver.made

    run(scenario, Driver())


def test_obstacles_are_an_error_that_says_what_to_change() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        with pytest.raises(Refused, match="db 1 cannot be attached: it is locked") as error:
            await attach(registry, driver, asked())
        assert error.value.hint == "unlock it"
        assert not driver.made

    run(scenario, Driver(host_pb2.Obstacle(what="it is locked", change="unlock it")))


def test_an_attached_guest_stays_until_it_is_detached() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        answer = await attach(registry, driver, asked(server="h1:7071"))
        assert answer.agent_config == f"{UUID} hugetlb h1:7071"
        assert answer.guest.name == UUID, "a name with a space is no name of a guest"
        registry.open_watch("t")
        registry.close_watch("t")
        await asyncio.sleep(0)
        assert registry.guests
        with pytest.raises(NotFound):
            await detach(registry, driver, host_pb2.DetachGuestRequest(name="other"))
        done = await detach(registry, driver, host_pb2.DetachGuestRequest(name=UUID))
        assert done.ledger.provisioned_bytes == 4 * MIB
        assert driver.made[0].closed == 1
        assert not registry.guests

    run(scenario, Driver())


def test_a_domain_is_attached_once() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        with pytest.raises(Refused, match="already"):
            await attach(registry, driver, asked())
        assert len(registry.guests) == 1

    run(scenario, Driver())


def test_a_guest_whose_door_is_gone_is_forgotten() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        driver.made[0].request.on_gone("QEMU let go of it")
        async with asyncio.timeout(30):
            while registry.guests:
                await asyncio.sleep(0.01)
        assert driver.made[0].closed == 1

    run(scenario, Driver())


def test_memory_that_somebody_plugs_and_unplugs_is_in_the_books() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        (guest,) = registry.guests
        door = driver.made[0].door

        async def books() -> host_pb2.Ledger:
            door.table_changed()
            await asyncio.sleep(0.05)
            return await guest.audits.ledger()

        door.pfns.append(1 << 20)
        assert (await books()).provisioned_bytes == 8 * MIB
        door.pfns.remove(1 << 20)
        door.pfns.append(1 << 21)
        after = await books()
        assert after.provisioned_bytes == 8 * MIB
        assert after.resident_bytes == 2 * PAGE_BYTES, "the file of what went is closed"
        assert after.provisioned_bytes == (
            after.resident_bytes + after.reclaimed_now_bytes + after.untouched_bytes
        )
        assert guest.provisioned_bytes == 8 * MIB

    run(scenario, Driver())


def test_a_domain_that_cannot_be_attached_again_is_forgotten_and_others_go_on() -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        (guest,) = registry.guests
        record = guest.record()
        assert record is not None
        later = Registry({}, attached=Unwilling())  # type: ignore[arg-type]
        await later.adopt([record], grace_s=0)
        assert not later.guests

    run(scenario, Driver())

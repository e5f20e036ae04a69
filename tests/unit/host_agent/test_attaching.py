"""Attached guests, whose domains are somebody else's: they belong to no trial, are forgotten when
somebody takes their memory door out, and wait for their domain when it ends."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import GuestLost, NotFound, Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2 import Telemetry
from host_agent.api.adopting import adopt
from host_agent.api.attaching import attach, detach
from host_agent.guests.driver import GuestRequest
from host_agent.registry import Registry
from host_agent.session.validation import check_telemetry
from tests.support.attached_domain import (
    SIZE,
    UUID,
    Driver,
    Running,
    asked,
    looking_often,
    ram_file,
    run,
    until,
)


class Unwilling(Driver):
    def adopt(self, _request: GuestRequest, _handle: object) -> Running:
        raise GuestLost("it is suspended")


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        answer = await attach(registry, driver, asked(dry_run=True))
        assert answer.domain == driver.domain
        assert not answer.HasField("guest")
        assert not registry.guests
        assert not driver.made

    run(scenario, Driver(tmp_path))


def test_obstacles_are_an_error_that_says_what_to_change(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        with pytest.raises(Refused, match="db 1 cannot be attached: it is locked") as error:
            await attach(registry, driver, asked())
        assert error.value.hint == "unlock it"
        assert not driver.made

    run(scenario, Driver(tmp_path, host_pb2.Obstacle(what="it is locked", change="unlock it")))


def test_an_attached_guest_stays_until_it_is_detached(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        answer = await attach(registry, driver, asked(server="h1:7071"))
        assert answer.agent_config == f"{UUID} hugetlb h1:7071"
        assert answer.guest.name == UUID, "a name with a space is no name of a guest"
        registry.trials.open_watch("t")
        registry.trials.close_watch("t")
        await asyncio.sleep(0)
        assert registry.guests
        with pytest.raises(Refused, match="not destroyed from here"):
            await registry.destroy(UUID)
        with pytest.raises(NotFound):
            await detach(registry, driver, host_pb2.DetachGuestRequest(name="other"))
        done = await detach(registry, driver, host_pb2.DetachGuestRequest(name=UUID))
        assert done.ledger.provisioned_bytes == SIZE
        assert driver.made[0].closed == 1
        assert not registry.guests

    run(scenario, Driver(tmp_path))


def test_a_domain_is_attached_once(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        with pytest.raises(Refused, match="already"):
            await attach(registry, driver, asked())
        assert len(registry.guests) == 1

    run(scenario, Driver(tmp_path))


def test_a_guest_whose_door_is_gone_is_forgotten(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        driver.made[0].qemu.close()
        async with asyncio.timeout(30):
            while registry.guests:
                await asyncio.sleep(0.01)
        assert driver.made[0].closed == 1

    run(scenario, Driver(tmp_path))


def test_memory_that_somebody_plugs_and_unplugs_is_in_the_books(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        (guest,) = registry.guests
        qemu = driver.made[0].qemu

        async def books() -> host_pb2.Ledger:
            await asyncio.sleep(0.05)
            return await guest.audits.ledger()

        await asyncio.to_thread(qemu.add, 1 << 32, SIZE, ram_file())
        assert (await books()).provisioned_bytes == 2 * SIZE
        await asyncio.to_thread(qemu.remove, 1 << 32, SIZE)
        await asyncio.to_thread(qemu.add, 1 << 33, SIZE, ram_file())
        after = await books()
        assert after.provisioned_bytes == 2 * SIZE
        assert after.resident_bytes == 2 * PAGE_BYTES, "the file of what went is closed"
        assert after.provisioned_bytes == (
            after.resident_bytes + after.reclaimed_now_bytes + after.untouched_bytes
        )
        assert guest.provisioned_bytes == 2 * SIZE
        check_telemetry(Telemetry(free_bytes=2 * SIZE), guest.largest_memory_bytes)

    run(scenario, Driver(tmp_path))


def test_a_guest_waits_for_its_domain_and_has_its_books_and_token_afterwards(
    tmp_path: Path,
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        (guest,) = registry.guests
        hinted = RangeSet([(0, 1)])
        guest.memory.post(hinted, await guest.memory.reclaim(hinted), 0)
        driver.end()
        with looking_often(registry, driver):
            await until(lambda: guest.to_attach_again is not None)
            assert guest.why_not_hinting == (
                "it is attached again when its domain runs: QEMU hung up"
            )
            await asyncio.sleep(0.05)
            assert registry.guests == (guest,)
            driver.refused, driver.domain.running = 0, True
            await until(lambda: driver.refused > 1)  # attaching is tried again
            driver.refused = None
            await until(lambda: len(driver.made) == 2)
            await until(lambda: registry.guests[0].running is not None)
        (again,) = registry.guests
        assert (again.name, again.uuid, again.token) == (guest.name, guest.uuid, guest.token)
        assert again.earlier.reclaimed_total_bytes == PAGE_BYTES
        assert (await again.audits.ledger()).reclaimed_total_bytes == 0
        await registry.end_all()

    run(scenario, Driver(tmp_path))


def test_a_guest_whose_domain_is_removed_is_forgotten(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        driver.end()
        await until(lambda: registry.guests[0].to_attach_again is not None)
        driver.domain.uuid = "another"
        with looking_often(registry, driver):
            await until(lambda: not registry.guests)

    run(scenario, Driver(tmp_path))


def test_a_guest_that_waits_can_be_detached(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        driver.end()
        await until(lambda: registry.guests[0].to_attach_again is not None)
        await detach(registry, driver, host_pb2.DetachGuestRequest(name=UUID))
        assert not registry.guests

    run(scenario, Driver(tmp_path))


def test_a_guest_that_waits_is_stored_for_the_next_host_agent(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attach(registry, driver, asked())
        (guest,) = registry.guests
        driver.end()
        await until(lambda: guest.to_attach_again is not None)
        record = guest.record()
        assert record is not None
        later = Registry({}, attached=Unwilling(tmp_path))  # type: ignore[arg-type]
        await adopt(later, [record], grace_s=0)
        (waiting,) = later.guests
        assert waiting.record() == record
        assert "it is suspended" in waiting.why_not_hinting

    run(scenario, Driver(tmp_path))

"""An attached guest whose domain ends: what is kept of it and what is freed, what a detach does
before and after, and what happens when its domain starts again."""

import asyncio
import os
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier, Event
from typing import Any, NoReturn

import pytest

from hintfleet.errors import OutcomeUnknown, Refused, TransientError
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.api.attaching import detach
from host_agent.door.door import MemoryDoor
from host_agent.guest import Guest
from host_agent.guests.attached.driver import AttachedGuest
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam
from host_agent.persistence.database import opened
from host_agent.registry import Registry
from tests.support.attached_domain import (
    SIZE,
    UUID,
    WAIT_S,
    Booting,
    Driver,
    HangsUp,
    Running,
    attached,
    ends_are_dealt_with,
    kept,
    looking_often,
    ram_file,
    reclaim_one_page,
    run,
    until,
)
from tests.support.front_end import FrontEnd
from tests.support.loops import running_loop

ANOTHER = "3e1b4b5e-6b1f-4c6e-9f0c-0000000000bb"
DETACH = host_pb2.DetachGuestRequest(name=UUID)
AWAY = Refused("libvirt does not answer")


# What an ended domain leaves


def descriptors_of(memfd: str) -> int:
    """Return how many descriptors of this process are of the memfd with this name."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += f"/memfd:{memfd} " in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of listdir
            continue
    return found


class Unreachable:
    """A connection to libvirt that cannot be opened."""

    def domain(self, uuid_text: str) -> NoReturn:
        raise AWAY


def test_the_memory_of_an_ended_qemu_is_freed_also_without_libvirt(tmp_path: Path) -> None:
    class Domain:
        def name(self) -> str:
            return "db"

        def ID(self) -> int:  # noqa: N802 - libvirt's name
            return 1

    with (
        running_loop() as loop,
        closing(MemoryDoor.listening(loop, tmp_path / "door", {os.geteuid()}, "g")) as door,
    ):
        qemu = FrontEnd(door.path)
        qemu.negotiate()
        fd = os.memfd_create("ended-ram")
        os.truncate(fd, SIZE)
        qemu.add(0, SIZE, fd)
        os.close(fd)
        qemu.start()
        assert door.wait_until_open(WAIT_S)
        ram = GuestRam(door.segments(), door.fence)
        hung_up = Event()
        door.when_disconnected(lambda _reason: hung_up.set())
        guest = AttachedGuest(Unreachable(), UUID, Domain(), "", door, ram, ExitStack())  # type: ignore[arg-type]
        with pytest.raises(Refused):
            guest.close()
        assert descriptors_of("ended-ram"), "QEMU runs: its RAM may be hinted"
        qemu.close()
        assert hung_up.wait(WAIT_S)
        with pytest.raises(Refused):
            guest.close()
        assert not descriptors_of("ended-ram")


def test_an_ended_qemu_is_closed_before_the_next_is_attached(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        (old,) = driver.made
        old.close_fails = AWAY
        driver.end()
        await until(lambda: guest.to_attach_again is not None)
        await ends_are_dealt_with(registry)
        driver.domain.running = True
        with looking_often(registry, driver):
            old.close_fails = None
            await until(lambda: registry.guests[0] is not guest)
            assert old.closed == 1
            await until(lambda: registry.guests[0].running is not None)

    run(scenario, Driver(tmp_path))


def test_memory_that_is_plugged_just_before_the_end_leaves_the_books(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        await reclaim_one_page(guest)
        (made,) = driver.made
        async with guest.memory.lock:  # as an audit or a punch holds the lock
            await asyncio.to_thread(made.qemu.add, 1 << 32, SIZE, ram_file())
            driver.end()
            await until(lambda: not made.door.pages())
        await until(lambda: guest.to_attach_again is not None)
        assert guest.memory.last_ledger.provisioned_bytes == SIZE
        assert guest.memory.last_ledger.reclaimed_total_bytes == PAGE_BYTES

    run(scenario, Driver(tmp_path))


def test_a_kept_guest_stays_when_its_end_is_reported_twice(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await kept(registry, driver)
        driver.made[0].request.on_gone("again")
        await ends_are_dealt_with(registry)
        assert registry.guests == (guest,)
        assert guest.record() is not None

    run(scenario, Driver(tmp_path))


def test_a_domain_that_ends_after_the_host_agent_has_left_it_is_still_stored(
    tmp_path: Path,
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        registry.shutting_down = True
        await registry.leave()
        driver.end()
        await until(lambda: guest.why_not_hinting == "QEMU hung up")
        await ends_are_dealt_with(registry)
        assert [record.name for record in state.guests()] == [guest.name]

    with opened(tmp_path / "state") as state:
        run(scenario, Driver(tmp_path), state)


# Detaching


def test_an_attempt_that_fails_does_not_undo_a_detach(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await kept(registry, driver)
        attempt = asyncio.create_task(registry.attach_again(guest, host_pb2.Ledger()))
        await until(driver.begun.is_set)
        detaching = asyncio.create_task(detach(registry, driver, DETACH))
        await until(lambda: registry.guests[0].ending)
        driver.fail.set()
        await detaching
        with pytest.raises(Refused, match="it boots"):
            await attempt
        assert not registry.guests
        assert not state.guests()

    with opened(tmp_path / "state") as state:
        run(scenario, Booting(tmp_path), state)


class Asked(Driver):
    """Does not answer whether the domain runs until the test sets `answer`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.answer = Event(), Event()

    def runs(self, uuid_text: str) -> bool:
        self.begun.set()
        assert self.answer.wait(WAIT_S)
        return True


def test_a_domain_that_is_asked_about_can_be_detached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await kept(registry, driver)
        attempts = []
        attach_again = registry.attach_again

        async def noted(guest: Guest, earlier: host_pb2.Ledger) -> None:
            await attach_again(guest, earlier)
            attempts.append(guest)

        monkeypatch.setattr(registry, "attach_again", noted)
        with looking_often(registry, driver):
            await until(driver.begun.is_set)
            await detach(registry, driver, DETACH)
            driver.answer.set()
            await until(lambda: bool(attempts))
        assert not registry.guests
        assert len(driver.made) == 1

    run(scenario, Asked(tmp_path))


def test_a_door_that_is_not_released_at_detach_goes_with_its_domain(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        await attached(registry, driver)
        driver.made[0].close_fails = OutcomeUnknown("the guest did not release it")
        with pytest.raises(OutcomeUnknown):
            await detach(registry, driver, DETACH)
        assert registry.guests, "detach can be called again"
        driver.made[0].close_fails = None
        driver.end()
        await until(lambda: not registry.guests)

    run(scenario, Driver(tmp_path))


def test_a_domain_that_ends_while_it_is_detached_is_not_stored_again(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        async with guest.memory.lock:  # as a punch holds the lock
            detaching = asyncio.create_task(registry.end(guest))
            await until(lambda: guest.ending)
            driver.end()
            await until(lambda: not driver.made[0].door.pages())
        await detaching
        await ends_are_dealt_with(registry)
        await registry.saver.save_changed()
        assert not registry.guests
        assert not state.guests()

    with opened(tmp_path / "state") as state:
        run(scenario, Driver(tmp_path), state)


def test_detach_answers_with_the_books_of_earlier_starts(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        await reclaim_one_page(guest)
        driver.end()
        await until(lambda: guest.to_attach_again is not None)
        driver.domain.running = True
        with looking_often(registry, driver):
            await until(lambda: registry.guests[0] is not guest)
            await until(lambda: registry.guests[0].running is not None)
        done = await detach(registry, driver, DETACH)
        assert done.ledger.reclaimed_total_bytes == 0
        assert done.earlier.reclaimed_total_bytes == PAGE_BYTES

    run(scenario, Driver(tmp_path))


# Attaching again


def test_an_error_when_a_guest_is_ended_keeps_no_other_from_being_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        failed = []

        async def forget(guest: Guest) -> None:
            failed.append(guest)
            raise TransientError("the disk is full")

        gone = await kept(registry, driver)
        with monkeypatch.context() as patch, looking_often(registry, driver):
            patch.setattr(registry.saver, "forget", forget)
            driver.domain.uuid = ANOTHER
            await until(lambda: failed == [gone])
            driver.domain.running = True
            other = await kept(registry, driver)
            driver.domain.running = True
            await until(lambda: registry.guests[0] is not other)
            await until(lambda: registry.guests[0].running is not None)

    run(scenario, Driver(tmp_path))


class Several(Driver):
    """Makes guests of several domains. If `at_once` is set, attempts wait at this barrier for each
    other."""

    at_once: Barrier | None = None

    def runs(self, uuid_text: str) -> bool:
        return self.domain.running

    def create(self, request: GuestRequest) -> Running:
        if self.at_once is not None:
            self.at_once.wait(WAIT_S)
        return super().create(request)


def test_several_domains_are_attached_at_the_same_time(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        first = await kept(registry, driver)
        driver.domain.uuid, driver.domain.running = ANOTHER, True
        second = await kept(registry, driver)
        assert registry.guests == (first, second)
        driver.at_once = Barrier(2)
        driver.domain.running = True
        with looking_often(registry, driver):
            await until(lambda: all(guest.running is not None for guest in registry.guests))
        assert [guest.uuid for guest in registry.guests] == [UUID, ANOTHER]

    run(scenario, Several(tmp_path))


def test_a_qemu_that_hangs_up_while_it_is_attached(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        await until(lambda: guest.to_attach_again is not None and guest.running is None)
        assert registry.guests == (guest,)
        assert driver.made[0].closed == 1

    run(scenario, HangsUp(tmp_path))

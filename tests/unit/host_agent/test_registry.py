"""Guests that are made and ended at the same time, with a driver that is slow or fails."""

import asyncio
import logging
import os
import sqlite3
import threading
from collections.abc import Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import GuestLost, Refused, TransientError
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam, Segment
from host_agent.persistence.database import opened
from host_agent.registry import Registry
from host_agent.session.stream import Stream
from tests.support.agents import HANG_S

TRIAL = "t"
SPEC = host_pb2.GuestSpec(driver=host_pb2.EMBEDDED, memory_bytes=MIB, method=host_pb2.NONE)


class Running:
    """A guest that has RAM, but no process. `closed` tells whether it was closed."""

    pid = 0
    domain = ""
    hypervisor = ""
    door = None
    balloon = None
    reporting = None
    handle: dict[str, int] = {}

    def __init__(self, may_end: threading.Event) -> None:
        fd = os.memfd_create("registry")
        os.truncate(fd, MIB)
        self.ram = GuestRam([Segment(pfn=0, page_count=MIB // PAGE_BYTES, fd=fd, offset_bytes=0)])
        self.closed = False
        self._may_end = may_end

    def evidence(self) -> str:
        return "its last words"

    def close(self) -> None:
        assert self._may_end.wait(HANG_S)
        self.ram.close()
        self.closed = True


class Stubborn:
    """A guest that a bug keeps from being ended."""

    def close(self) -> None:
        raise ZeroDivisionError


class Driver:
    """Makes and ends guests when the test tells it to."""

    def __init__(self) -> None:
        self.may_make, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.made: list[Running] = []
        self.fails: OSError | None = None

    def create(self, request: GuestRequest) -> Running:
        assert self.may_make.wait(HANG_S)
        if self.fails is not None:
            raise self.fails
        self.made.append(Running(self.may_end))
        return self.made[-1]

    def close(self) -> None:
        """Do nothing: this driver holds nothing."""


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def registry_with(driver: Driver) -> Registry:
    registry = Registry({host_pb2.EMBEDDED: driver})  # type: ignore[dict-item]
    registry.trials.open_watch(TRIAL)
    return registry


async def made(registry: Registry, name: str = "g") -> None:
    """Make a guest, attach its workload, and wait until the guest is ready."""
    creating = asyncio.create_task(registry.create(name, TRIAL, SPEC))
    while not any(guest.name == name and guest.running for guest in registry.guests):
        await asyncio.sleep(0.01)
    registry.get(name).sessions.attach_workload(Stream())
    await creating


def test_a_guest_that_is_ended_while_it_is_made_leaves_nothing() -> None:
    async def scenario() -> None:
        driver = Driver()
        registry = registry_with(driver)
        creating = asyncio.create_task(registry.create("g", TRIAL, SPEC))
        await asyncio.sleep(0.05)
        registry.trials.close_watch(TRIAL)  # as when the one who watches has gone
        await asyncio.sleep(0.05)
        driver.may_make.set()
        with pytest.raises(GuestLost):
            await creating
        await registry.end_all()
        assert not registry.guests
        assert [one.closed for one in driver.made] == [True]

    run(scenario())


def test_a_host_agent_that_ends_makes_no_guest() -> None:
    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        registry = registry_with(driver)
        registry.shutting_down = True
        with pytest.raises(TransientError, match="this host agent ends"):
            await registry.create("g", TRIAL, SPEC)
        assert not registry.guests
        assert not driver.made

    run(scenario())


def test_a_policy_that_this_host_agent_does_not_have_is_refused() -> None:
    """For example, one of a later version."""

    async def scenario() -> None:
        spec = host_pb2.GuestSpec(
            driver=host_pb2.EMBEDDED, memory_bytes=MIB, method=host_pb2.HINTING
        )
        spec.hinting.policy = "lazy"
        registry = registry_with(Driver())
        with pytest.raises(Refused, match="no policy 'lazy'") as caught:
            await registry.create("g", TRIAL, spec)
        assert caught.value.hint == "policy: adaptive or eager or cold or pressure"
        assert not registry.guests

    run(scenario())


def test_a_name_is_free_again_when_its_guest_has_ended() -> None:
    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        registry = registry_with(driver)
        await made(registry)
        first = registry.get("g")
        driver.may_end.clear()
        registry.trials.close_watch(TRIAL)
        registry.trials.open_watch(TRIAL)  # watched again before the earlier guest has ended
        creating = asyncio.create_task(registry.create("g", TRIAL, SPEC))
        await asyncio.sleep(0.1)
        assert not creating.done()
        driver.may_end.set()
        while not any(guest.running for guest in registry.guests if guest is not first):
            await asyncio.sleep(0.01)
        registry.get("g").sessions.attach_workload(Stream())
        running: object = (await creating).running
        assert running is driver.made[1]
        await registry.end_all()

    run(scenario())


def test_a_guest_that_could_not_be_ended_is_tried_again_for_the_next_trial() -> None:
    """Its name is the next trial's, and its memory is missing: no run could use this host again."""

    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        registry = registry_with(driver)
        await made(registry)
        (running,) = driver.made
        end = running.close

        def fail() -> None:
            running.close = end  # type: ignore[method-assign]
            raise Refused("libvirt does not answer")

        running.close = fail  # type: ignore[method-assign]
        registry.trials.close_watch(TRIAL)
        registry.trials.open_watch("next")
        creating = asyncio.create_task(registry.create("g", "next", SPEC))
        while not (len(driver.made) == 2 and registry.get("g").running):
            assert not creating.done(), creating.exception()
            await asyncio.sleep(0.01)
        assert running.closed
        registry.get("g").sessions.attach_workload(Stream())
        await creating
        await registry.end_all()

    run(scenario())


def test_a_host_agent_that_leaves_its_guests_waits_for_one_that_is_being_made(
    tmp_path: Path,
) -> None:
    """Else the next host agent could begin while a thread of this one still makes the guest, which
    nobody would know."""

    async def scenario() -> None:
        driver = Driver()
        with opened(tmp_path) as state:
            registry = Registry({host_pb2.EMBEDDED: driver}, state)  # type: ignore[dict-item]
            registry.trials.open_watch(TRIAL)
            creating = asyncio.create_task(registry.create("g", TRIAL, SPEC))
            await asyncio.sleep(0.05)
            registry.shutting_down = True
            leaving = asyncio.create_task(registry.leave())
            await asyncio.sleep(0.1)
            assert not leaving.done()
            driver.may_make.set()
            await leaving
            assert [record.name for record in state.guests()] == ["g"]
            creating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await creating
            assert [one.closed for one in driver.made] == [False], "the guest lives on"
            assert [record.name for record in state.guests()] == ["g"]
        driver.made[0].ram.close()

    run(scenario())


def test_a_bug_that_keeps_a_guest_from_ending_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        registry = registry_with(driver)
        await made(registry)
        registry.get("g").running = Stubborn()  # type: ignore[assignment]
        await registry.end_all()
        driver.made[0].ram.close()

    run(scenario())
    (line,) = [one for one in caplog.records if one.getMessage() == "guest cannot be ended"]
    assert line.levelno == logging.ERROR
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], ZeroDivisionError)


def test_a_creation_that_the_machine_refuses_can_be_retried() -> None:
    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        driver.fails = OSError(24, "Too many open files")
        registry = registry_with(driver)
        command = host_pb2.CommandId(run_id="r", trial_id=TRIAL, sequence=1)

        async def create() -> object:
            return await registry.create("g", TRIAL, SPEC)

        with pytest.raises(Refused, match=r"guest g cannot be made: .*Too many open files"):
            await registry.commands.once(command, create)
        driver.fails = None
        again = asyncio.create_task(registry.commands.once(command, create))
        while not registry.guests or registry.guests[0].running is None:
            await asyncio.sleep(0.01)
        registry.get("g").sessions.attach_workload(Stream())
        await again
        await registry.end_all()

    run(scenario())


def test_all_guests_that_cannot_be_saved_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        driver = Driver()
        driver.may_make.set()
        with opened(tmp_path) as state:
            registry = Registry({host_pb2.EMBEDDED: driver}, state)  # type: ignore[dict-item]
            registry.trials.open_watch(TRIAL)
            for name in ("one", "two", "three"):
                await made(registry, name)
            (path,) = tmp_path.glob("*/state.db")
            with closing(sqlite3.connect(path)) as database:
                database.execute("DROP TABLE guest")
            with pytest.raises(TransientError, match="no such table"):
                await registry.leave()
        for guest in driver.made:
            guest.ram.close()

    run(scenario())
    lines = [one for one in caplog.records if one.getMessage() == "another guest failed, too"]
    assert [one.hintfleet_fields["guest"] for one in lines] == ["two", "three"]  # type: ignore[attr-defined]

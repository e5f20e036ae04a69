"""Attached guests of an earlier host agent: which books they have when they are adopted."""

import errno
import os
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hintfleet.units import PAGE_BYTES
from host_agent.api.adopting import adopt
from host_agent.guests.attached.driver import AttachedGuest
from host_agent.guests.driver import GuestRequest, Handle
from host_agent.persistence.database import GuestRecord
from host_agent.registry import Registry
from tests.support.attached_domain import (
    UUID,
    Driver,
    HangsUp,
    Running,
    attached,
    kept,
    reclaim_one_page,
    run,
    until,
)


class Again(Driver):
    """Attaches and adopts guests of a domain that has been started `start` times."""

    def __init__(self, folder: Path, start: int) -> None:
        super().__init__(folder)
        self.start = start

    def create(self, request: GuestRequest) -> Running:
        made = super().create(request)
        made.handle = {"start": self.start}
        return made

    def adopt(self, request: GuestRequest, _handle: object) -> Running:
        return self.create(request)


async def record_of_one_page(registry: Registry, driver: Driver) -> GuestRecord:
    """Attach the domain, reclaim a page, and shut the domain off; return the record to adopt."""
    guest = await attached(registry, driver)
    await reclaim_one_page(guest)
    driver.end()
    await until(lambda: guest.to_attach_again is not None)
    record = guest.record()
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("start", "now_bytes", "earlier_bytes"), [(1, PAGE_BYTES, 0), (2, 0, PAGE_BYTES)]
)
def test_another_start_of_a_domain_has_fresh_books_when_it_is_adopted(
    tmp_path: Path, start: int, now_bytes: int, earlier_bytes: int
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        record = await record_of_one_page(registry, driver)
        driver.start, driver.domain.running = start, True
        later = Registry({}, attached=driver)
        await adopt(later, [record], grace_s=0)
        (adopted,) = later.guests
        assert (await adopted.audits.ledger()).reclaimed_total_bytes == now_bytes
        assert adopted.earlier.reclaimed_total_bytes == earlier_bytes
        await later.end_all()

    run(scenario, Again(tmp_path, start=1))


class NoFile(Again):
    """An operating system that opens no more files while a guest is adopted."""

    def adopt(self, _request: GuestRequest, _handle: object) -> Running:
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_guest_whose_files_cannot_be_opened_does_not_stop_the_host_agent(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        record = await record_of_one_page(registry, driver)
        later = Registry({}, attached=driver)
        await adopt(later, [record], grace_s=0)
        (lost,) = later.guests
        assert "Too many open files" in lost.why_not_hinting
        await later.end_all()

    run(scenario, NoFile(tmp_path, start=1))


def test_a_qemu_that_hangs_up_while_it_is_adopted(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        record = (await kept(registry, driver)).record()
        assert record is not None
        driver.domain.running = True
        later = Registry({}, attached=driver)
        await adopt(later, [record], grace_s=0)
        await until(lambda: bool(later.guests) and later.guests[0].running is None)
        (adopted,) = later.guests
        assert adopted.to_attach_again is not None
        assert driver.made[1].closed == 1

    run(scenario, HangsUp(tmp_path))


def handle(qemu: int) -> Handle:
    """Return the handle of a domain's first start by libvirt's numbers; `qemu` is QEMU's pid."""
    unused: Any = None
    domain = SimpleNamespace(name=lambda: "db", ID=lambda: 1)
    door: Any = SimpleNamespace(pid=qemu)
    return AttachedGuest(unused, UUID, domain, "", door, unused, ExitStack()).handle


def test_another_start_of_a_domain_with_the_same_number_is_another_start() -> None:
    """A libvirtd that starts while no domain runs begins with 1 again."""
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert handle(os.getpid()) == handle(os.getpid())
            assert handle(os.getpid()) != handle(other.pid)
        finally:
            other.kill()
    assert handle(0) == handle(0), "a QEMU in another container has no pid here"


def test_books_that_an_older_hintfleet_has_stored_are_still_those_of_the_domain(
    tmp_path: Path,
) -> None:
    class Newer(Again):
        def create(self, request: GuestRequest) -> Running:
            made = super().create(request)
            made.handle = {**made.handle, "pid": os.getpid()}
            return made

    async def scenario(registry: Registry, driver: Any) -> None:
        record = await record_of_one_page(registry, driver)
        driver.domain.running = True
        later = Registry({}, attached=driver)
        await adopt(later, [replace(record, handle={"start": 1})], grace_s=0)
        (adopted,) = later.guests
        assert (await adopted.audits.ledger()).reclaimed_total_bytes == PAGE_BYTES
        await later.end_all()

    run(scenario, Newer(tmp_path, start=1))

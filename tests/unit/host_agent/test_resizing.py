"""A resize first unplugs a DIMM that is in no books because the resize that plugged it failed. If
a DIMM in the books cannot be unplugged, the guest is told to use it again."""

import asyncio
import os
from typing import Any

import pytest

from hintfleet.errors import OutcomeUnknown, Refused, TransientError
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.guest import Guest
from host_agent.memory.ram import GuestRam, Segment
from host_agent.resizing import SECTION_BYTES, resize

STRAY = RangeSet([(1 << 20, SECTION_BYTES // PAGE_BYTES)])


class Running:
    """A guest with a DIMM that was plugged, but is in no books."""

    pid = 0
    domain = ""
    hypervisor = ""
    door = balloon = reporting = None

    def __init__(self, ram: GuestRam, releases: bool) -> None:
        self.ram = ram
        self.there = STRAY
        self._releases = releases

    def plugged(self) -> RangeSet:
        return self.there

    def unplug(self, pages: RangeSet) -> None:
        if not self._releases:
            raise OutcomeUnknown("the guest did not release dimm0 within 20 s")
        self.there -= pages


def resized(ram: GuestRam, *, releases: bool) -> Any:
    """Resize a guest that has a stray DIMM to the size in its books; return its `Running`."""
    size_bytes = ram.pages.page_count * PAGE_BYTES
    spec = host_pb2.GuestSpec(
        memory_bytes=size_bytes,
        max_memory_bytes=size_bytes + SECTION_BYTES,
        method=host_pb2.NONE,
    )
    running = Running(ram, releases)

    async def scenario() -> None:
        guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
        guest.started(running)  # type: ignore[arg-type]
        await resize(guest, size_bytes)
        assert guest.provisioned_bytes == size_bytes

    asyncio.run(scenario())
    return running


def test_a_dimm_that_is_in_no_books_is_unplugged_first(ram: GuestRam) -> None:
    assert resized(ram, releases=True).there == EMPTY


def test_a_dimm_that_is_still_not_released_is_an_error(ram: GuestRam) -> None:
    with pytest.raises(OutcomeUnknown, match="did not release dimm0"):
        resized(ram, releases=False)


class RefusesToUnplug(Running):
    """A guest whose DIMM, which is in the books, cannot be unplugged."""

    def to_unplug(self, _size_bytes: int) -> list[RangeSet]:
        return [STRAY]

    def unplug(self, _pages: RangeSet) -> None:
        raise Refused("its memory is in use")


@pytest.mark.parametrize("answers", [True, False])
def test_a_guest_that_cannot_be_told_to_use_the_rest_again(
    ram: GuestRam, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    size_bytes = ram.pages.page_count * PAGE_BYTES
    spec = host_pb2.GuestSpec(
        memory_bytes=size_bytes,
        max_memory_bytes=size_bytes + SECTION_BYTES,
        method=host_pb2.NONE,
    )
    told: list[str | None] = []

    async def scenario() -> None:
        guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
        guest.started(RefusesToUnplug(ram, releases=False))  # type: ignore[arg-type]
        fd = os.memfd_create("dimm")
        os.truncate(fd, SECTION_BYTES)
        ((pfn, page_count),) = STRAY
        guest.memory.plugged([Segment(pfn=pfn, page_count=page_count, fd=fd, offset_bytes=0)])

        async def run_step(numbered: Any) -> None:
            told.append(numbered(1).WhichOneof("command"))
            if told[-1] == "online" and not answers:
                raise TransientError("its workload is not connected")

        monkeypatch.setattr(guest.sessions, "run_step", run_step)
        await resize(guest, size_bytes)

    expected = Refused if answers else OutcomeUnknown
    with pytest.raises(expected, match="its memory is in use") as error:
        asyncio.run(scenario())
    assert told == ["offline", "online"]
    assert error.value.hint == ("" if answers else "resize the guest again")

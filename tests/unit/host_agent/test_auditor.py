"""One task audits all guests, and no guest can stop it."""

import asyncio
import os

import pytest

from hintfleet.errors import GuestLost
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.api.sampling import sample_set
from host_agent.auditor import audit_when_due
from host_agent.budget.budget import Budget
from host_agent.cpu_meter import CpuMeter
from host_agent.guest import Guest
from host_agent.memory.ram import GuestRam, Segment
from tests.support.agents import HANG_S

TOUCHED_PAGES = 512


class Running:
    """A guest without a process."""

    pid = 0
    domain = ""
    hypervisor = ""
    door = balloon = reporting = None

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.truncate(self.fd, 1024 * PAGE_BYTES)
        self.ram = GuestRam([Segment(pfn=0, page_count=1024, fd=self.fd, offset_bytes=0)])

    def close(self) -> None:
        """Do nothing: the test closes the files."""

    def touch(self) -> None:
        os.pwrite(self.fd, bytes(TOUCHED_PAGES * PAGE_BYTES), 0)


def started(name: str, running: Running, observing: CpuMeter) -> Guest:
    spec = host_pb2.GuestSpec(method=host_pb2.NONE)
    guest = Guest(name=name, uuid=name, token="t", trial_id="t", spec=spec, observing=observing)
    guest.started(running)  # type: ignore[arg-type]
    return guest


def test_what_comes_back_is_found_though_another_guests_audit_fails() -> None:
    async def scenario() -> None:
        observing = CpuMeter()
        broken, whole = Running(), Running()
        guests = [started("broken", broken, observing), started("whole", whole, observing)]
        os.close(broken.fd)
        auditing = asyncio.create_task(audit_when_due(lambda: guests, observing))
        whole.touch()
        async with asyncio.timeout(HANG_S):
            while guests[1].memory.books_now().untouched_bytes == 1024 * PAGE_BYTES:
                await asyncio.sleep(0.05)
        untouched_bytes = guests[1].memory.books_now().untouched_bytes
        assert untouched_bytes == (1024 - TOUCHED_PAGES) * PAGE_BYTES
        with pytest.raises(GuestLost, match="cannot be looked at"):
            await guests[0].ready(HANG_S)
        assert observing.cpu_ns > 0
        # The broken guest can be sampled and ended like other guests.
        sampled = sample_set(guests, Budget(limit_bytes=0), observing)
        assert sampled.samples[0].guest_name == "broken"
        await guests[0].close()
        auditing.cancel()
        whole.ram.close()

    asyncio.run(scenario())

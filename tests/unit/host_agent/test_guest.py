"""What a guest is told of memory that goes and comes."""

import asyncio

from hintfleet.ranges import RangeSet, decode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.gate import Epochs
from host_agent.guest import Guest
from host_agent.ram import GuestRam, Segment
from host_agent.stream import Stream

DEVICE = RangeSet([(4096, 1024)])


class Running:
    """A guest that does nothing."""

    pid = 0
    balloon = None

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram


async def told_after_unplugging(ram: GuestRam, again: list[Segment]) -> object:
    """What a guest in session is told next; None for nothing."""
    spec = host_pb2.GuestSpec(method=host_pb2.HINTING)
    guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
    guest.started(Running(ram))  # type: ignore[arg-type]
    stream = Stream()
    guest.connect_hinting(stream, "boot", Epochs())
    assert isinstance(await stream.next(), hinting_pb2.HostMessage), "the welcome"
    await guest.unplugged(DEVICE)
    if again:
        await guest.plugged(again)
    await guest.tell_refaults()
    stream.end()
    return await stream.next()


def test_absent_memory_that_was_unplugged_is_told(ram: GuestRam) -> None:
    message = asyncio.run(told_after_unplugging(ram, []))
    assert isinstance(message, hinting_pb2.HostMessage)
    assert decode(message.refaulted.ranges) == DEVICE


def test_absent_memory_that_came_back_is_no_news(ram: GuestRam, ram_fd: int) -> None:
    """It is absent again: to hint it would gain nothing."""
    device = Segment(pfn=4096, page_count=1024, fd=ram_fd, offset_bytes=3072 * PAGE_BYTES)
    assert asyncio.run(told_after_unplugging(ram, [device])) is None

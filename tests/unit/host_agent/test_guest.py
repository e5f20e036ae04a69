"""What a guest is told about memory that is unplugged, plugged and used; and an audit that is not
cut off with its caller."""

import asyncio
import os
import threading
from typing import Any

import pytest

from hintfleet.ranges import RangeSet, decode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.guest import Guest
from host_agent.memory.page_map import PageMap
from host_agent.memory.ram import GuestRam, Look, Segment
from host_agent.session.gate import Epochs
from host_agent.session.stream import Stream
from tests.support.agents import HANG_S

DEVICE = RangeSet([(4096, 1024)])


class Running:
    """A guest without a process."""

    pid = 0
    domain = ""
    door = None
    balloon = None
    reporting = None

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram


async def told_after_unplugging(ram: GuestRam, again: list[Segment]) -> object:
    """Begin a session, unplug DEVICE, and plug `again`; return the next message to the guest, or
    None if there is none."""
    spec = host_pb2.GuestSpec(method=host_pb2.HINTING)
    guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
    guest.started(Running(ram))  # type: ignore[arg-type]
    stream = Stream()
    guest.sessions.connect_hinting(stream, Epochs())
    assert isinstance(await stream.next(), hinting_pb2.HostMessage), "the welcome"
    await guest.unplugged(DEVICE)
    if again:
        await guest.plugged(again)
    await guest.audits.tell_refaults()
    stream.end()
    return await stream.next()


def test_absent_memory_that_was_unplugged_is_reported(ram: GuestRam) -> None:
    message = asyncio.run(told_after_unplugging(ram, []))
    assert isinstance(message, hinting_pb2.HostMessage)
    assert decode(message.refaulted.ranges) == DEVICE


def test_absent_memory_that_came_back_is_not_told(ram: GuestRam, ram_fd: int) -> None:
    """Memory that was unplugged and plugged again is absent: to hint it would gain nothing."""
    device = Segment(pfn=4096, page_count=1024, fd=ram_fd, offset_bytes=3072 * PAGE_BYTES)
    assert asyncio.run(told_after_unplugging(ram, [device])) is None


def started(ram: GuestRam) -> Guest:
    spec = host_pb2.GuestSpec(method=host_pb2.HINTING)
    guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
    guest.started(Running(ram))  # type: ignore[arg-type]
    return guest


async def told_on_a_new_session(guest: Guest, epochs: Epochs) -> tuple[int, Stream, object]:
    """Begin a session; return its number, its stream, and the message that reports refaulted
    chunks."""
    stream = Stream()
    session = guest.sessions.connect_hinting(stream, epochs)
    await stream.next()  # the welcome
    await guest.audits.tell_refaults()
    return session, stream, await stream.next()


def test_refaults_told_on_a_link_that_was_cut_are_told_again(ram: GuestRam, ram_fd: int) -> None:
    """Otherwise a guest that did not receive the message would count those chunks as absent for
    ever."""

    async def scenario() -> None:
        guest, epochs = started(ram), Epochs()
        os.pwrite(ram_fd, b"x", 3 * PAGE_BYTES)
        for _ in range(2):
            session, stream, message = await told_on_a_new_session(guest, epochs)
            assert isinstance(message, hinting_pb2.HostMessage)
            assert decode(message.refaulted.ranges) == RangeSet([(0, 512)])
            stream.end()
            guest.sessions.leave_hinting(session)

    asyncio.run(scenario())


def test_unplugged_memory_is_told_again_in_the_next_session(ram: GuestRam) -> None:
    """Otherwise a guest would count unplugged memory as absent if its session ended right after the
    unplugging."""

    async def scenario() -> None:
        guest, epochs = started(ram), Epochs()
        await guest.unplugged(DEVICE)
        for _ in range(2):
            session, stream, message = await told_on_a_new_session(guest, epochs)
            assert isinstance(message, hinting_pb2.HostMessage)
            assert decode(message.refaulted.ranges) == DEVICE
            stream.end()
            guest.sessions.leave_hinting(session)

    asyncio.run(scenario())


def test_an_audit_is_awaited_though_its_caller_is_gone(
    ram: GuestRam, ram_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, may_end = threading.Event(), threading.Event()
    look = ram.look

    def slow(within: PageMap, *how: Any) -> Look:
        looking.set()
        assert may_end.wait(HANG_S)
        return look(within, *how)

    async def scenario() -> None:
        guest = started(ram)
        os.pwrite(ram_fd, b"x", 0)
        monkeypatch.setattr(ram, "look", slow)
        asking = asyncio.create_task(guest.audits.ledger())
        assert await asyncio.to_thread(looking.wait, HANG_S)
        asking.cancel()
        unplugging = asyncio.create_task(guest.unplugged(DEVICE))
        await asyncio.sleep(0.05)
        assert not unplugging.done(), "the RAM is changed while a thread audits it"
        may_end.set()
        await unplugging

    asyncio.run(scenario())

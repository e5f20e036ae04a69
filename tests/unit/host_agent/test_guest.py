"""What a guest is told about memory that is unplugged, plugged and used; an audit that is not cut
off with its caller; memory that an operator takes; and a guest that is lost."""

import asyncio
import os
import threading
import time
import traceback
from typing import Any

import pytest

from hintfleet.errors import GuestLost
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
    hypervisor = ""
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
    """Memory that was unplugged and plugged again is absent: a guest that was told otherwise would
    hint it in vain."""
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


def test_memory_that_an_operator_takes_hides_no_refault(ram: GuestRam, ram_fd: int) -> None:
    """`virsh setmem` of an attached domain takes memory without a batch. If the books counted it as
    resident, no audit would look before as much had come back: savings would be overstated."""

    async def scenario() -> host_pb2.Ledger:
        guest = started(ram)
        memory, audits = guest.memory, guest.audits
        os.pwrite(ram_fd, b"x" * (100 * PAGE_BYTES), 0)
        await audits.ledger()
        hinted = RangeSet([(0, 10)])
        memory.post(hinted, await memory.reclaim(hinted), wire_bytes=3)
        ram.punch(RangeSet([(20, 80)]), ram.permit())  # the balloon
        assert memory.moved_pages() == 80, "or no look would be due"
        await memory.run_locked(memory.look())
        os.pwrite(ram_fd, b"x" * (5 * PAGE_BYTES), 0)
        assert memory.moved_pages() == 5
        await memory.run_locked(memory.look())
        return memory.books_now()

    books = asyncio.run(scenario())
    assert books.reclaimed_total_bytes == 10 * PAGE_BYTES
    assert books.refaulted_total_bytes == 5 * PAGE_BYTES
    assert (
        books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
        == books.provisioned_bytes
    )


def test_a_batch_that_is_being_reclaimed_causes_no_look(ram: GuestRam, ram_fd: int) -> None:
    """Until it is posted, as much is missing as if an operator had taken it."""

    async def scenario() -> None:
        guest = started(ram)
        os.pwrite(ram_fd, b"x" * (100 * PAGE_BYTES), 0)
        await guest.audits.ledger()
        hinted = RangeSet([(0, 10)])
        async with guest.memory.lock:
            outcome = await guest.memory.reclaim(hinted)
            assert guest.memory.moved_pages() == 0
            guest.memory.post(hinted, outcome, wire_bytes=3)
        assert guest.memory.moved_pages() == 0

    asyncio.run(scenario())


def test_a_guest_whose_batch_was_half_dropped_unseen_is_lost(ram_fd: int) -> None:
    """Otherwise its books would count the dropped half as resident, and hide as many refaults."""
    other_fd = os.memfd_create("other")
    os.truncate(other_fd, 8 * PAGE_BYTES)
    ram = GuestRam(
        [
            Segment(pfn=0, page_count=8, fd=ram_fd, offset_bytes=0),
            Segment(pfn=8, page_count=8, fd=other_fd, offset_bytes=0),
        ]
    )

    async def scenario() -> None:
        guest = started(ram)
        for fd in (ram_fd, other_fd):
            os.pwrite(fd, bytes(8 * PAGE_BYTES), 0)
        await guest.audits.ledger()
        pipe = os.pipe()  # a pipe can be neither punched nor looked at
        os.dup2(pipe[0], other_fd)
        for fd in pipe:
            os.close(fd)
        hinted = RangeSet([(0, 16)])
        outcome = await guest.memory.run_locked(guest.memory.reclaim(hinted))
        assert outcome.skipped == {hinting_pb2.HOST_ERROR: hinted}
        assert os.fstat(ram_fd).st_blocks == 0, "the first half is dropped"
        assert guest.why_not_hinting == "its RAM cannot be looked at: Illegal seek"

    asyncio.run(scenario())
    ram.close()


def test_a_step_on_a_lost_guest_fails_at_once(ram: GuestRam) -> None:
    """Also after the stream of its workload has ended."""

    async def scenario() -> None:
        guest, stream = started(ram), Stream()
        guest.sessions.attach_workload(stream)
        guest.lost("it crashed")
        guest.sessions.leave_workload(stream)
        asked_s = time.monotonic()
        with pytest.raises(GuestLost, match="it crashed"):
            await guest.sessions.run_step(lambda n: hinting_pb2.WorkloadCommand(command_id=n))
        assert guest.sessions.workload_is_there.is_set()
        assert time.monotonic() - asked_s < 0.5

    asyncio.run(scenario())


def test_a_lost_guest_that_is_asked_again_and_again_takes_no_more_memory(ram: GuestRam) -> None:
    """Its agent may connect again for weeks: nothing of an ended stream may stay."""

    def frames(error: GuestLost) -> int:
        return len(list(traceback.walk_tb(error.__traceback__)))

    async def ended(guest: Guest, epochs: Epochs) -> GuestLost:
        stream = Stream()
        session = guest.sessions.connect_hinting(stream, epochs)
        with pytest.raises(GuestLost) as caught:
            await stream.next()
        guest.sessions.leave_hinting(session)
        return caught.value

    async def refused(guest: Guest) -> GuestLost:
        with pytest.raises(GuestLost) as caught:
            await guest.sessions.settle()
        return caught.value

    async def scenario() -> None:
        guest, epochs = started(ram), Epochs()
        guest.lost("it crashed")
        assert frames(await ended(guest, epochs)) == frames(await ended(guest, epochs))
        assert frames(await refused(guest)) == frames(await refused(guest))

    asyncio.run(scenario())


def test_a_guest_whose_balloon_fails_by_a_bug_is_lost(ram: GuestRam) -> None:
    """Otherwise its method would have stopped without a word, and its trial would go on."""

    class Broken:
        def stats(self) -> None:
            raise KeyError("actual")

    async def scenario() -> None:
        spec = host_pb2.GuestSpec(method=host_pb2.BALLOON)
        guest = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
        running = Running(ram)
        running.balloon = Broken()  # type: ignore[assignment]
        guest.started(running)  # type: ignore[arg-type]
        guest.sessions.attach_workload(Stream())
        with pytest.raises(GuestLost, match="KeyError: 'actual'"):
            await guest.ready(HANG_S)

    asyncio.run(scenario())

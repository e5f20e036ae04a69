"""The memory door over a real socket, with a fake QEMU: RAM is added and removed, and QEMU waits
for a punch that runs. Malformed messages and strangers are refused."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from ctypes import c_int64
from pathlib import Path
from threading import Event, Thread

import pytest

from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB
from host_agent.door.door import MemoryDoor
from host_agent.door.protocol import HEADER, Request
from host_agent.memory.fence import FenceClosed
from host_agent.memory.punch import punch
from host_agent.memory.ram import GuestRam
from tests.support.agents import wait_until
from tests.support.front_end import FrontEnd
from tests.support.loops import running_loop

SIZE = 64 * MIB
PAGES = SIZE // 4096


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with running_loop() as made:
        yield made


@pytest.fixture
def door(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> Iterator[MemoryDoor]:
    made = MemoryDoor.listening(loop, tmp_path / "door", {os.geteuid()}, "g1")
    with closing(made):
        yield made


@contextmanager
def guest_memory(size: int = SIZE) -> Iterator[int]:
    fd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def started(door: MemoryDoor, fd: int) -> Iterator[FrontEnd]:
    with closing(FrontEnd(door.path)) as qemu:
        qemu.negotiate()
        qemu.add(0, SIZE, fd)
        qemu.start()
        assert door.wait_until_open(30)
        yield qemu


class Watched:
    def __init__(self, loop: asyncio.AbstractEventLoop, door: MemoryDoor) -> None:
        self.events: list[str] = []
        loop.call_soon_threadsafe(door.watch, self._moved)

    def _moved(self, why_closed: str | None) -> None:
        self.events.append("closed" if why_closed else "open")


def test_memory_comes_with_its_addresses(door: MemoryDoor) -> None:
    with guest_memory() as low, guest_memory() as high, started(door, low) as qemu:
        qemu.add(1 << 32, SIZE // 2, high, offset=SIZE // 2)
        os.pwrite(high, b"here", SIZE // 2)
        with closing(GuestRam(door.segments())) as ram:
            assert ram.pages == RangeSet([(0, PAGES), (1 << 20, PAGES // 2)])
            assert ram.resident_bytes() == 4096
            ram.punch(RangeSet([(1 << 20, 1)]), ram.permit())
            assert os.pread(high, 4, SIZE // 2) == bytes(4)
        qemu.remove(1 << 32, SIZE // 2)
        with closing(GuestRam(door.segments())) as ram:
            assert ram.pages == RangeSet([(0, PAGES)])
        assert door.pid == os.getpid()


def test_a_file_with_two_regions_is_counted_once(door: MemoryDoor) -> None:
    with guest_memory(2 * SIZE) as fd, started(door, fd) as qemu:
        os.pwrite(fd, b"here", 0)
        qemu.add(1 << 32, SIZE, fd, offset=SIZE)
        with closing(GuestRam(door.segments())) as ram:
            assert ram.resident_bytes() == 4096
        with closing(GuestRam(door.segments(besides=RangeSet([(1 << 20, PAGES)])))) as ram:
            ram.plug(door.segments(besides=ram.pages))
            assert ram.resident_bytes() == 4096, "by another descriptor, but the same file"
        half = RangeSet([(0, PAGES), (1 << 20, PAGES // 2)])
        (grown,) = door.segments(besides=half)
        assert (grown.pfn, grown.page_count) == ((1 << 20) + PAGES // 2, PAGES // 2)
        assert grown.offset_bytes == SIZE + SIZE // 2
        os.close(grown.fd)
        (high,) = door.segments(besides=RangeSet([(0, PAGES)]))
        assert (high.pfn, high.offset_bytes) == (1 << 20, SIZE)
        os.close(high.fd)


def test_it_opens_and_closes_with_the_device(
    loop: asyncio.AbstractEventLoop, door: MemoryDoor
) -> None:
    watched = Watched(loop, door)
    with (
        guest_memory() as fd,
        started(door, fd) as qemu,
        closing(GuestRam(door.segments(), door.fence)) as ram,
    ):
        qemu.stop()
        assert watched.events == ["closed", "open", "closed"]
        with pytest.raises(FenceClosed):
            ram.punch(ram.pages, ram.permit())
        # QEMU starts the device again without handing over the memory once more.
        qemu.start()
        assert door.wait_until_open(30)
        ram.punch(ram.pages, ram.permit())
    wait_until(lambda: watched.events == ["closed", "open", "closed", "open", "closed"], "its end")
    assert not door.wait_until_open(0)


def test_qemu_waits_for_one_punch_but_not_for_the_batch(
    door: MemoryDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = Event(), Event()
    punched: list[int] = []

    def slow_punch(
        fd: int, offsets: array[int], lengths: array[int], closed_times: c_int64, permit: int
    ) -> None:
        for at in range(len(offsets)):
            one = slice(at, at + 1)
            punch(fd, offsets[one], lengths[one], closed_times, permit)
            punched.append(lengths[at])
            inside.set()
            assert go_on.wait(30)

    monkeypatch.setattr("host_agent.memory.ram.punch", slow_punch)
    with (
        guest_memory() as fd,
        started(door, fd) as qemu,
        closing(GuestRam(door.segments(), door.fence)) as ram,
    ):
        os.pwrite(fd, bytes(SIZE), 0)
        said: list[BaseException] = []

        def batch(permit: int) -> None:
            try:
                ram.punch(ram.pages, permit)
            except FenceClosed as error:
                said.append(error)

        thread = Thread(target=batch, args=(ram.permit(),))
        thread.start()
        assert inside.wait(30)
        qemu.ask_to_stop()
        qemu.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            qemu.answer(Request.GET_VRING_BASE)
        qemu.socket.settimeout(30)
        go_on.set()
        qemu.wait_until_stopped()
        thread.join()
        assert said
        assert 0 < sum(punched) < SIZE
        assert os.fstat(fd).st_blocks * 512 == SIZE - sum(punched)


def test_a_connection_that_breaks_closes_it(
    loop: asyncio.AbstractEventLoop, door: MemoryDoor
) -> None:
    watched = Watched(loop, door)
    with guest_memory() as fd:
        with started(door, fd):
            pass
        wait_until(lambda: watched.events == ["closed", "open", "closed"], "the door to close")
        # QEMU connects once more, as after the device was unplugged and plugged again.
        with started(door, fd):
            assert watched.events == ["closed", "open", "closed", "open"]


@pytest.mark.parametrize(
    ("request_number", "flags", "payload"),
    [
        (Request.GET_FEATURES, 2, b""),
        (Request.GET_FEATURES, 1 | 4, b""),
        (Request.ADD_MEM_REG, 1, bytes(40)),
        (Request.REM_MEM_REG, 1, struct.pack("=QQQQQ", 0, 4096, 4096, 0, 0)),
        (Request.SET_MEM_TABLE, 1, struct.pack("=II", 1, 0) + bytes(32)),
        (Request.SET_VRING_KICK, 1, b"short"),
        (24, 1, b""),
        (999, 1, bytes(1025)),
    ],
)
def test_what_is_no_message_ends_the_connection(
    door: MemoryDoor, request_number: int, flags: int, payload: bytes
) -> None:
    with closing(FrontEnd(door.path)) as qemu:
        qemu.negotiate()
        qemu.send(request_number, payload, flags=flags)
        with suppress(ConnectionResetError):  # the door hung up before it read the payload
            assert qemu.socket.recv(1) == b""
    with guest_memory() as fd, started(door, fd):
        pass


def test_a_message_in_pieces_is_one_message(door: MemoryDoor) -> None:
    with closing(FrontEnd(door.path)) as qemu:
        for byte in HEADER.pack(Request.GET_FEATURES, 1, 0):
            qemu.socket.send(bytes([byte]))
        assert len(qemu.answer(Request.GET_FEATURES)) == 8


def test_no_descriptor_is_left(door: MemoryDoor) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with guest_memory() as fd, started(door, fd) as qemu:
            qemu.stop()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == len(before), "descriptors to close")


def test_strangers_are_refused(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    with (
        closing(MemoryDoor.listening(loop, tmp_path / "d", {os.geteuid() + 1}, "g1")) as door,
        closing(FrontEnd(door.path)) as qemu,
        suppress(ConnectionError),
    ):
        qemu.socket.send(HEADER.pack(Request.GET_FEATURES, 1, 0))
        assert qemu.socket.recv(1) == b""


def test_memory_that_is_no_memfd_is_refused(door: MemoryDoor, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(SIZE)
        with started(door, file.fileno()), pytest.raises(Refused, match="memfd"):
            door.segments()


def test_a_host_agent_without_descriptors_turns_qemu_away(
    door: MemoryDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise QEMU would wait for an answer for ever, and its guest would stand still."""

    async def no_descriptors(_listener: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with closing(FrontEnd(door.path)) as first:
        first.negotiate()  # `first` is accepted, so only the next accept fails
        monkeypatch.setattr(door._loop, "sock_accept", no_descriptors)
    wait_until(lambda: door._listener.fileno() < 0, "the door to stop listening")
    with pytest.raises(ConnectionRefusedError):
        FrontEnd(door.path)

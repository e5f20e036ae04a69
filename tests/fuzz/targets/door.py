"""The memory door's back end, fed with any messages: each table is valid, no descriptor is closed
twice, and the device does not run after a request that stops it.

The oracle is a record of the open descriptors and of those in the table: after each accepted
message, they are the same.
"""

from __future__ import annotations

import itertools
import struct

from hintfleet.errors import InvalidInput
from hintfleet.units import PAGE_BYTES
from host_agent.door.protocol import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    MAX_REGIONS,
    Backend,
    Drop,
    Reply,
    Request,
    Start,
    Stop,
    Table,
    check_size,
)
from tests.fuzz.source import Source
from tests.fuzz.target import Target

_REQUESTS = (*Request, 2, 3, 8, 9, 10, 13, 17, 24, 31, 40, 0, 1 << 31)
_STOPS = (
    Request.GET_VRING_BASE,
    Request.RESET_OWNER,
    Request.RESET_DEVICE,
    Request.SET_VRING_ENABLE,  # with 0; with 1 it stops nothing
)
_NUMBERS = (0, 1, PAGE_BYTES, 512 * PAGE_BYTES, 1 << 32, (1 << 52) - PAGE_BYTES, (1 << 64) - 1)


class _Edge:
    """Carries out the back end's actions, as host_agent/door/door.py does, and checks them."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.open_fds: set[int] = set()
        self.in_table: set[int] = set()
        self.runs = False
        self._next_fd = 3

    def receive(self, request: int, flags: int, payload: bytes, fd_count: int) -> bool:
        """Give a message to the back end; return whether it was accepted. If not, the connection
        must be closed."""
        fds = list(range(self._next_fd, self._next_fd + fd_count))
        self._next_fd += fd_count
        self.open_fds.update(fds)
        ran, before = self.runs, self.in_table
        try:
            actions = self.backend.received(request, flags, payload, fds)
        except InvalidInput:
            self.open_fds.difference_update(fds)
            assert {region.fd for region in self.backend.regions} == before
            return False
        replies = 0
        for action in actions:
            match action:
                case Stop():
                    assert self.runs
                    assert not replies, "answered before the punch is over"
                    self.runs = False
                case Start():
                    assert not self.runs
                    self.runs = True
                case Table(regions):
                    assert len(regions) <= MAX_REGIONS
                    for below, above in itertools.pairwise(regions):
                        assert below.end <= above.address
                    for region in regions:
                        assert region.size_bytes > 0
                        assert not (region.address | region.size_bytes) % PAGE_BYTES
                        assert not region.offset_bytes % PAGE_BYTES
                    self.in_table = {region.fd for region in regions}
                    assert len(self.in_table) == len(regions)
                case Drop(dropped):
                    assert len(set(dropped)) == len(dropped)
                    assert self.open_fds.issuperset(dropped), "closed twice"
                    self.open_fds.difference_update(dropped)
                case Reply(message):
                    replies += 1
                    answered, _, size = HEADER.unpack(message[: HEADER.size])
                    assert (answered, size) == (request, len(message) - HEADER.size)
        assert replies <= 1
        assert self.open_fds == self.in_table, "a descriptor is lost, or one of the table is closed"
        enables = request == Request.SET_VRING_ENABLE and struct.unpack("=II", payload)[1] == 1
        stops = request in _STOPS and not enables
        assert not (ran and stops and self.runs), "runs after a stop"
        assert self.runs == self.backend.is_running
        return True


def try_input(data: bytes) -> None:
    source = Source(data)
    edge = _Edge()
    goes_on = True
    while source.more and goes_on:
        request = source.choice(_REQUESTS)
        shape = source.number()
        fd_count = shape >> 4 & 3
        if shape & 8:
            payload = source.short()
        elif request == Request.SET_MEM_TABLE:
            numbers = [source.choice(_NUMBERS) for _ in range(4 * fd_count)]
            payload = struct.pack(f"=II{len(numbers)}Q", fd_count, 0, *numbers)
        elif request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            payload = struct.pack("=5Q", 0, *(source.choice(_NUMBERS) for _ in range(4)))
        elif request in (Request.SET_VRING_KICK, Request.SET_PROTOCOL_FEATURES):
            payload = struct.pack("=Q", source.choice((0, 1, 1 << 3 | 1 << 15, 1 << 8, 300)))
        else:
            payload = struct.pack("=II", source.choice((0, 1, 255, 256)), shape & 1)
        check_size(len(payload))
        assert len(payload) <= MAX_PAYLOAD_BYTES
        goes_on = edge.receive(request, source.choice((1, 9, 5, 2)), payload, fd_count)


def _seed(*steps: tuple[int, ...]) -> bytes:
    return bytes(number for step in steps for number in step)


_INDEX = {request: number for number, request in enumerate(_REQUESTS)}

TARGET = Target.of(
    try_input,
    seeds=(
        _seed(
            (_INDEX[Request.GET_FEATURES], 0, 0, 0),
            (_INDEX[Request.SET_PROTOCOL_FEATURES], 0, 2, 0),
            (_INDEX[Request.ADD_MEM_REG], 16, 0, 3, 0, 0, 1),
            (_INDEX[Request.SET_VRING_KICK], 16, 0, 0),
            (_INDEX[Request.ADD_MEM_REG], 16, 4, 2, 1, 0, 1),
            (_INDEX[Request.REM_MEM_REG], 0, 4, 2, 1, 0, 1),
            (_INDEX[Request.GET_VRING_BASE], 0, 0, 0),
        ),
        _seed((_INDEX[Request.SET_MEM_TABLE], 32, 0, 2, 0, 0, 4, 2, 0, 0, 1)),
        _seed(
            (_INDEX[Request.ADD_MEM_REG], 16, 0, 3, 0, 0, 1),
            (_INDEX[Request.SET_VRING_KICK], 16, 0, 0),
            (_INDEX[Request.SET_VRING_ENABLE], 1, 0, 0),
        ),
    ),
    max_bytes=256,
    quick_runs=20_000,
)

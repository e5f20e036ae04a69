"""QEMU's side of the memory door: the messages of vhost-user in the order in which QEMU 7.2 sends
them for a virtiofs device."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from host_agent.door.protocol import HEADER, Request

_SET_FEATURES, _SET_OWNER, _SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = 2, 3, 8, 9, 10
_SET_VRING_CALL = 13
_NEEDS_REPLY = 1 << 3
_QUEUES = (0, 1)


class FrontEnd:
    """A connection to a memory door, as QEMU opens it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(os.fspath(path))

    def close(self) -> None:
        self.socket.close()

    def send(
        self, request: int, payload: bytes = b"", *, flags: int = 1, fd: int | None = None
    ) -> None:
        message = HEADER.pack(request, flags, len(payload)) + payload
        socket.send_fds(self.socket, [message], [] if fd is None else [fd])

    def ask(self, request: int, payload: bytes = b"", *, fd: int | None = None) -> bytes:
        """Send a request that asks for a reply; return the payload of the reply."""
        self.send(request, payload, flags=1 | _NEEDS_REPLY, fd=fd)
        return self.answer(request)

    def answer(self, request: int) -> bytes:
        answered, _, size = HEADER.unpack(self._exactly(HEADER.size))
        assert answered == request
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "the door hung up"
            data += more
        return data

    def negotiate(self) -> None:
        """Exchange the messages with which QEMU creates the device."""
        (features,) = struct.unpack("=Q", self._get(Request.GET_FEATURES))
        offered = self._get(Request.GET_PROTOCOL_FEATURES)
        self.send(Request.SET_PROTOCOL_FEATURES, offered)
        self._get(Request.GET_MAX_MEM_SLOTS)
        self.send(_SET_OWNER)
        self.send(_SET_FEATURES, struct.pack("=Q", features))

    def _get(self, request: int) -> bytes:
        self.send(request)
        return self.answer(request)

    def add(self, address: int, size: int, fd: int, offset: int = 0) -> None:
        """Hand over a region of memory, and check that the door accepts it."""
        region = struct.pack("=QQQQQ", 0, address, size, 0x7F0000000000 + address, offset)
        assert self.ask(Request.ADD_MEM_REG, region, fd=fd) == bytes(8)

    def remove(self, address: int, size: int) -> None:
        """Take a region back from the door, and check that the door accepts it."""
        region = struct.pack("=QQQQQ", 0, address, size, 0x7F0000000000 + address, 0)
        assert self.ask(Request.REM_MEM_REG, region) == bytes(8)

    def start(self) -> None:
        """Start the device, as QEMU does when the guest's driver is ready."""
        for queue in _QUEUES:
            for request in (_SET_VRING_NUM, _SET_VRING_BASE):
                self.send(request, struct.pack("=II", queue, 0))
            self.send(_SET_VRING_ADDR, struct.pack("=II", queue, 0) + bytes(32))
            for kind in (Request.SET_VRING_KICK, _SET_VRING_CALL):
                event = os.eventfd(0)
                self.send(kind, struct.pack("=Q", queue), fd=event)
                os.close(event)

    def ask_to_stop(self) -> None:
        """Begin to stop the device: send GET_VRING_BASE for queue 0, and do not wait for an answer.
        `wait_until_stopped` does the rest."""
        self.send(Request.GET_VRING_BASE, struct.pack("=II", 0, 0))

    def wait_until_stopped(self) -> None:
        assert self.answer(Request.GET_VRING_BASE) == struct.pack("=II", 0, 0)
        assert self._get_base(1) == struct.pack("=II", 1, 0)

    def _get_base(self, queue: int) -> bytes:
        self.send(Request.GET_VRING_BASE, struct.pack("=II", queue, 0))
        return self.answer(Request.GET_VRING_BASE)

    def stop(self) -> None:
        """Stop the device and wait until it is stopped, as QEMU does before a reset."""
        self.ask_to_stop()
        self.wait_until_stopped()

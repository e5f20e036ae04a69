"""A TCP relay between guests and their host agent, for tests of networks that fail.

A test can cut, stall and delay single connections, and have a function called before the next bytes
are passed on. The relay records the first bytes that a guest sends on a connection. It finds the
guest's UUID and token in them, which is possible only without TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

# The message Identity as protobuf encodes it: field 1 of 36 bytes, then field 2 of 32 bytes.
_IDENTITY = re.compile(rb"\x0a\x24([0-9a-f-]{36})\x12\x20([0-9a-f]{32})")
_CHUNK_BYTES = 1 << 16
_RECORDED_BYTES = 1 << 16
_OLD_LINKS_KEPT = 8
_RESET = struct.pack("ii", 1, 0)
"""struct linger: closing a socket sends RST at once (socket(7))."""


class Direction(Enum):
    """The direction in which bytes are sent."""

    TO_HOST = "to host"
    TO_GUEST = "to guest"


@dataclass(frozen=True, kw_only=True)
class Address:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse `HOST:PORT`."""
        host, _, port = text.rpartition(":")
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Link:
    """One connection of a guest to the host agent, through the relay."""

    def __init__(self, guest: asyncio.StreamWriter, host: asyncio.StreamWriter) -> None:
        self.guest_uuid = self.token = ""
        """Empty until the guest has sent its identity."""
        self.recorded = bytearray()
        """The first bytes that the guest sent, up to _RECORDED_BYTES."""
        self.delay_s = 0.0
        """How long each piece is delayed from now on."""
        self._writers = {Direction.TO_HOST: host, Direction.TO_GUEST: guest}
        self._flows = asyncio.Event()
        self._flows.set()
        self._before_next: dict[Direction, list[Callable[[], None]]] = {
            direction: [] for direction in Direction
        }

    def cut(self) -> None:
        """Reset the connection at both ends; bytes on their way are lost."""
        for writer in self._writers.values():
            # Without this, the kernel would still send what it has, and then close (socket(7)).
            with contextlib.suppress(OSError):  # it is closed already
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        self._flows.set()

    def stall(self) -> None:
        """Hold back all bytes, and keep the connection open at both ends."""
        self._flows.clear()

    def resume(self) -> None:
        """Let bytes pass again after `stall`."""
        self._flows.set()

    def before_next(self, direction: Direction, act: Callable[[], None]) -> None:
        """Call `act` once: when the next piece in this direction arrives, before it is sent on."""
        self._before_next[direction].append(act)

    def cancel_before_next(self, direction: Direction, act: Callable[[], None]) -> bool:
        """Cancel `before_next`; return True if no piece has arrived: `act` is never called then."""
        with contextlib.suppress(ValueError):
            self._before_next[direction].remove(act)
            return True
        return False

    async def pump(self, direction: Direction, reader: asyncio.StreamReader) -> None:
        """Pass bytes in one direction until either end closes its side; then close both sides."""
        writer = self._writers[direction]
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                if direction is Direction.TO_HOST:
                    self._note(data)
                acts, self._before_next[direction] = self._before_next[direction], []
                for act in acts:
                    act()
                await self._flows.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        for end in self._writers.values():
            end.close()

    def _note(self, data: bytes) -> None:
        self.recorded += data[: _RECORDED_BYTES - len(self.recorded)]
        if not self.guest_uuid and (said := _IDENTITY.search(self.recorded)):
            self.guest_uuid, self.token = said[1].decode(), said[2].decode()


class Relay:
    """Listens on its own port, and relays each connection to `upstream`."""

    def __init__(self) -> None:
        self.upstream: Address | None = None
        """Where the host agent listens for guests; None while there is none."""
        self.links: list[Link] = []
        """The open links."""
        self.closed: dict[str, list[Link]] = {}
        """The most recently closed links of each guest, up to _OLD_LINKS_KEPT."""
        self.link_count = 0
        self.delay_s = 0.0
        """The delay of links that are opened from now on."""
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Address]:
        """Relay until the block ends, then cut all links; yield the address of the relay."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for link in self.links:
                link.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def links_of(self, guest_uuid: str) -> list[Link]:
        """Return the open links of a guest."""
        return [link for link in self.links if link.guest_uuid == guest_uuid]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay a connection in a task of ours, so that `serving` can cancel and await the task."""
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(
        self, from_guest: asyncio.StreamReader, to_guest: asyncio.StreamWriter
    ) -> None:
        try:
            if self.upstream is None:
                raise ConnectionRefusedError
            from_host, to_host = await asyncio.open_connection(
                self.upstream.host, self.upstream.port
            )
        except ConnectionError:
            to_guest.transport.abort()
            return
        link = Link(to_guest, to_host)
        link.delay_s = self.delay_s
        self.links.append(link)
        self.link_count += 1
        try:
            await asyncio.gather(
                link.pump(Direction.TO_HOST, from_guest), link.pump(Direction.TO_GUEST, from_host)
            )
        finally:
            self.links.remove(link)
            old = self.closed.setdefault(link.guest_uuid, [])
            old.append(link)
            del old[:-_OLD_LINKS_KEPT]

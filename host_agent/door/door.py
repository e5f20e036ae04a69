"""A guest's memory door: the socket on which QEMU hands over the guest's RAM, and waits for the
host agent's answer before it stops the guest.

The host agent is the vhost-user back end of a virtiofs device that nobody mounts. Messages are
handled in `protocol.Backend`; this module serves the socket, on the host agent's event loop.

A door is open while punches may run: from the start of the device until QEMU stops the device or
the connection ends. QEMU stops the device before it suspends or resets the guest, loads a state
into the guest, or removes the device, and does nothing else until it has the answer. If the host
agent is killed, the kernel closes the socket only after the last thread of the host agent has left
the kernel (kernel/exit.c: exit_files). So even then QEMU cannot continue before the last punch has
ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from threading import Condition

from hintfleet.errors import InvalidInput, Refused
from hintfleet.logs import fields
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import PAGE_BYTES, format_size
from host_agent.door.protocol import (
    HEADER,
    MAX_DESCRIPTORS,
    Action,
    Backend,
    Drop,
    Region,
    Reply,
    Start,
    Stop,
    Table,
    check_size,
)
from host_agent.memory.fence import Fence
from host_agent.memory.ram import Segment

# struct ucred of SO_PEERCRED (unix(7)): process id, user id, group id.
_UCRED = struct.Struct("=iII")
_BACKLOG = 1

BACKING_HINT = (
    "give the domain shared memory of its own: <memoryBacking><source type='memfd'/>"
    "<access mode='shared'/></memoryBacking>"
)

_log = logging.getLogger("hintfleet.host.door")


class MemoryDoor:
    """The door of one guest. Whoever calls `listening` owns the door, and must close it.

    :ivar fence: open while QEMU runs the device.
    :ivar pid: process id of the QEMU that connected last; 0 before the first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        path: Path,
        uids: Collection[int],
        guest: str,
    ) -> None:
        """Call `listening` instead: it makes the listener."""
        self.fence = Fence()
        self.fence.close(_nothing)
        self.path = path
        self.pid = 0
        self._loop = loop
        self._guest = guest
        self._uids = uids
        self._listener = listener
        self._changed = Condition()
        """Held while `_regions` or `_is_open` change, and while `segments` duplicates the regions'
        descriptors."""
        self._regions: tuple[Region, ...] = ()
        self._is_open = self._is_connected = False
        self._moved: Callable[[str | None], None] = _ignore
        self._disconnected: Callable[[str], None] = _ignore
        self._table_changed: Callable[[], object] = _nothing
        self._serving: asyncio.Task[None] | None = None
        loop.call_soon_threadsafe(self._begin)

    @classmethod
    def listening(
        cls, loop: asyncio.AbstractEventLoop, path: Path, uids: Collection[int], guest: str
    ) -> MemoryDoor:
        """Listen on a socket at `path`, for one QEMU at a time; return the door, which the caller
        must close. A file that is at `path` already is replaced.

        :param loop: serves the socket; runs in another thread than the caller's.
        :param uids: the users to serve; others are disconnected when their turn comes.
        :param guest: the guest's name, for logs.
        :raises Refused: the socket cannot be made there.
        """
        try:
            with contextlib.ExitStack() as undo:
                listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                path.unlink(missing_ok=True)
                listener.bind(os.fspath(path))
                # QEMU's user must be able to connect; `_serve` disconnects users that are not in
                # `uids`.
                path.chmod(0o666)
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                undo.pop_all()
        except OSError as error:
            raise Refused(
                f"cannot listen at {path}: {error.strerror or error}",
                hint="choose another --state DIR, or another TMPDIR without it",
            ) from error
        return cls(loop, listener, path, uids, guest)

    # Methods for the guest's owner, to be called on the event loop

    def watch(self, moved: Callable[[str | None], None]) -> None:
        """Call `moved` now and whenever the door opens or closes: with None if the door is open,
        with the reason if it is closed."""
        self._moved = moved
        moved(None if self._is_open else "its memory door is not open")

    # Methods for any thread; but do not block the event loop with `wait_until_open` and `close`

    def wait_until_open(self, timeout_s: float) -> bool:
        """Wait until the door is open, at most for `timeout_s`; return whether it is open."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_open, timeout_s)

    def segments(self, besides: RangeSet = EMPTY) -> list[Segment]:
        """Return where the guest's RAM is. The caller must close the segments' files.

        :param besides: RAM to leave out.
        :raises Refused: some of this RAM is not in a shared memfd with small pages.
        """
        # QEMU sends a file again with each region in it, each time as another descriptor. The
        # segments share one descriptor for each file.
        opened: dict[int, int] = {}
        segments = []
        with self._changed, contextlib.ExitStack() as undo:
            for region in self._regions:
                first = region.address // PAGE_BYTES
                new = RangeSet([(first, region.size_bytes // PAGE_BYTES)]) - besides
                if not new:
                    continue
                _check_file(region)
                inode = os.fstat(region.fd).st_ino
                if inode not in opened:
                    opened[inode] = os.dup(region.fd)
                    undo.callback(os.close, opened[inode])
                segments += [
                    Segment(
                        pfn=pfn,
                        page_count=page_count,
                        fd=opened[inode],
                        offset_bytes=region.offset_bytes + (pfn - first) * PAGE_BYTES,
                    )
                    for pfn, page_count in new
                ]
            undo.pop_all()
        return segments

    def when_disconnected(self, call: Callable[[str], None]) -> None:
        """Call `call` with the reason, on the event loop, when the connection to QEMU ends (except
        by `close`), and now if there is no connection. Replaces an earlier `call`."""

        def begin() -> None:
            self._disconnected = call
            if not self._is_connected:
                call("QEMU has hung up already")

        self._loop.call_soon_threadsafe(begin)

    def when_table_changes(self, call: Callable[[], object]) -> None:
        """Call `call` on the event loop whenever QEMU has sent its table, added RAM to it or
        removed some; not when QEMU hangs up."""
        self._table_changed = call

    def pages(self) -> RangeSet:
        """Return all pages of RAM that QEMU shares with us now; none after it has hung up."""
        with self._changed:
            regions = self._regions
        return RangeSet(
            (region.address // PAGE_BYTES, region.size_bytes // PAGE_BYTES) for region in regions
        )

    def close(self) -> None:
        """Let no punch begin, wait until none runs, hang up, and remove the socket. May be called
        twice."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    # Serving the socket

    def _begin(self) -> None:
        self._serving = self._loop.create_task(self._serve())

    async def _end(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])

    async def _serve(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # no free descriptors, for example
                _log.warning("door cannot be served", extra=self._fields(reason=error.strerror))
                # QEMU and its guest stand still until QEMU has an answer: closing the listener
                # ends the connection that waits to be accepted.
                self._listener.close()
                return
            with connection:
                connection.setblocking(False)
                pid, uid, _ = _UCRED.unpack(
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                )
                if uid in self._uids:
                    await self._serve_one(connection, pid)
                else:
                    _log.warning("door refused a stranger", extra=self._fields(pid=pid, uid=uid))

    async def _serve_one(self, connection: socket.socket, pid: int) -> None:
        self.pid, self._is_connected = pid, True
        _log.info("door connected", extra=self._fields(pid=pid))
        reason = "QEMU hung up"
        backend = Backend()
        try:
            await self._talk(connection, backend)
        except (InvalidInput, OSError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - a bug: only this guest is not hinted any more
            reason = f"{type(error).__name__}: {error}"
            _log.error("door failed", extra=self._fields(), exc_info=error)
        finally:
            # Wait for punches first: QEMU continues as soon as the socket is closed.
            await self._stop(reason)
            regions = backend.regions
            self._set_regions(())
            _close_all(region.fd for region in regions)
            self._is_connected = False
            _log.info("door disconnected", extra=self._fields(pid=pid, reason=reason))
        self._disconnected(reason)

    async def _talk(self, connection: socket.socket, backend: Backend) -> None:
        while message := await _receive(connection):
            request, flags, payload, fds = message
            try:
                actions = backend.received(request, flags, payload, fds)
            except InvalidInput:
                _close_all(fds)
                raise
            for action in actions:
                await self._carry_out(action, connection)

    async def _carry_out(self, action: Action, connection: socket.socket) -> None:
        match action:
            case Stop():
                await self._stop("QEMU stopped the device: the guest was stopped or reset")
            case Start():
                self._start()
            case Table(regions):
                self._set_regions(regions)
                self._table_changed()
            case Drop(fds):
                _close_all(fds)
            case Reply(message):
                await self._loop.sock_sendall(connection, message)

    def _start(self) -> None:
        self.fence.open()
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
        _log.info("door opened", extra=self._fields(regions=len(self._regions)))
        self._moved(None)

    async def _stop(self, reason: str) -> None:
        """Close the door and its fence, and wait until no punch is inside the fence. If
        the door is closed already, wait all the same: an earlier wait may have been cancelled."""
        if self._is_open:
            with self._changed:
                self._is_open = False
            _log.info("door closed", extra=self._fields(reason=reason))
            self._moved(reason)
        empty = asyncio.Event()
        self.fence.close(partial(self._loop.call_soon_threadsafe, empty.set))
        await empty.wait()

    def _set_regions(self, regions: tuple[Region, ...]) -> None:
        with self._changed:
            self._regions = regions

    def _fields(self, **more: object) -> dict[str, dict[str, object]]:
        return fields(guest=self._guest, **more)


async def _receive(connection: socket.socket) -> tuple[int, int, bytes, list[int]] | None:
    """Return the next message: request, flags, payload and descriptors; None at the end of the
    stream. The caller owns the descriptors.

    :raises InvalidInput: it is too long, or has too many descriptors.
    """
    fds: list[int] = []
    try:
        header = await _receive_bytes(connection, HEADER.size, fds)
        if header is None:
            return None
        request, flags, size_bytes = HEADER.unpack(header)
        check_size(size_bytes)
        payload = await _receive_bytes(connection, size_bytes, fds)
        if payload is None:
            return None
        owned, fds = fds, []
        return request, flags, payload, owned
    finally:
        _close_all(fds)


async def _receive_bytes(
    connection: socket.socket, size_bytes: int, fds: list[int]
) -> bytes | None:
    """Return the next `size_bytes` bytes; None if the stream ends before. Append all descriptors
    that arrive with them to `fds`.

    :raises InvalidInput: `fds` has more than MAX_DESCRIPTORS descriptors then.
    """
    data = b""
    while len(data) < size_bytes:
        try:
            # One descriptor more than the limit, so that a message with too many is detected.
            more, received, _, _ = socket.recv_fds(
                connection, size_bytes - len(data), MAX_DESCRIPTORS + 1, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            await _readable(connection)
            continue
        fds += received
        if len(fds) > MAX_DESCRIPTORS:
            raise InvalidInput(f"a vhost-user message with more than {MAX_DESCRIPTORS} descriptors")
        if not more:
            return None
        data += more
    return data


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)


def _check_file(region: Region) -> None:
    """Check that holes can be punched into a region's file page by page.

    :raises Refused: they cannot; says what to change.
    """
    # For a file on hugetlbfs, f_bsize is the size of a huge page.
    is_memfd = os.readlink(f"/proc/self/fd/{region.fd}").startswith("/memfd:")
    if not is_memfd or os.fstatvfs(region.fd).f_bsize != PAGE_BYTES:
        raise Refused(
            f"{format_size(region.size_bytes)} of the guest's memory at {region.address:#x} are"
            " not in a shared memfd with small pages",
            hint=BACKING_HINT,
        )


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _nothing() -> None:
    pass


def _ignore(_: str | None) -> None:
    pass

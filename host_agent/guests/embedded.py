"""Embedded guests: each is a process, and its RAM is a memfd of this host.

The host agent makes the memfd and keeps a descriptor of it. The host agent has descriptors of a
virtual machine's RAM, too: so reclaim and accounting are the same for both.

By default a guest ends with its host agent: the guest's stdin is a pipe from the host agent, and
the guest ends at end of file. Under Survival a guest ends when it has had no host agent for
`orphan_after_s`. The next host agent finds the guest's process by pid and start time, and the
guest's RAM among the open files of that process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Protocol

from hintfleet.agent_config import AgentConfig
from hintfleet.errors import GuestLost, Refused
from hintfleet.ranges import RangeSet
from hintfleet.settings import Driver
from hintfleet.system.processes import find_process
from hintfleet.units import PAGE_BYTES, format_size
from hintfleet.v1 import host_pb2
from host_agent.door.door import MemoryDoor
from host_agent.guests.agent_settings import agent_config
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.guests.driver import GuestRequest, Handle, Survival
from host_agent.guests.guest_log import GuestLog
from host_agent.memory.ram import GuestRam, Segment


class _Process(Protocol):
    """The process of an embedded guest: a child of this process, or of an earlier host agent."""

    pid: int

    def wait(self) -> str:
        """Wait until the process has ended; return how it ended, for a message."""

    def kill(self) -> None:
        """Kill the process, if it has not ended; `wait` returns soon after."""

    def close(self) -> None:
        """Close the host agent's descriptors for the process."""


class _Child:
    """The process of an embedded guest that this host agent has started."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self._popen = popen

    def wait(self) -> str:
        return f"ended with status {self._popen.wait()}"

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        if self._popen.stdin is not None:
            # close() first writes what is still buffered. That fails if the process has ended;
            # then nobody needs it.
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()


class _Adopted:
    """The process of an embedded guest that an earlier host agent has started."""

    def __init__(self, handle: Handle) -> None:
        """:raises GuestLost: there is no such process any more."""
        self.pid = handle["pid"]
        try:
            self._fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise self.lost() from None
        # Compare start times after opening: the descriptor stays with one process, but a pid may
        # be given to another process at any time. If the start time of the process that has the
        # pid now is the guest's, the descriptor is the guest's too.
        found = find_process(self.pid)
        if found is None or found.start_ticks != handle["start_ticks"]:
            self.close()
            raise self.lost()

    def lost(self) -> GuestLost:
        return GuestLost(f"its process {self.pid} ended while there was no host agent")

    def has_ended(self, timeout_ms: int | None = 0) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def wait(self) -> str:
        # A pidfd is readable once the process has ended (pidfd_open(2)). The exit status is not
        # known: only a parent may wait(2) for it.
        self.has_ended(timeout_ms=None)
        return "ended"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._fd)


class EmbeddedGuest:
    """A running guest process."""

    domain = ""
    hypervisor = ""
    door: MemoryDoor | None = None
    balloon: Balloon | None = None
    reporting: Reporting | None = None

    def __init__(
        self, request: GuestRequest, process: _Process, ram: GuestRam, log: GuestLog, handle: Handle
    ) -> None:
        """Take ownership of process, RAM and log.

        :param handle: identifies the process, and the RAM by its descriptor in that process.
        """
        self.pid = process.pid
        self.ram = ram
        self._handle = handle
        self._first = RangeSet([(0, request.spec.memory_bytes // PAGE_BYTES)])
        self._on_gone = request.on_gone
        self._process = process
        self._log = log
        self._closed = False
        self._waiter = Thread(target=self._wait, name=f"wait-{request.name}", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        how = self._process.wait()
        self._on_gone(f"its process {self.pid} {how}: {self.evidence()}")

    @property
    def handle(self) -> Handle:
        """Identifies the process and its RAM."""
        # The size of the RAM is stored, because the RAM file always has the maximum size.
        return {**self._handle, "memory_bytes": self.ram.provisioned_bytes}

    def plugged(self) -> RangeSet:
        """Return the pages that are plugged now: the RAM but for what the guest started with."""
        return self.ram.pages - self._first

    def plug(self, size_bytes: int) -> list[Segment]:
        """Return the next `size_bytes` of the RAM file after the present RAM, as one segment."""
        (ram,) = self.ram.pages
        return [_segment(ram.end_pfn, size_bytes, self.ram.only_fd())]

    def to_unplug(self, size_bytes: int) -> list[RangeSet]:
        """Return the last `size_bytes` of the RAM, as the pages of one device."""
        (ram,) = self.ram.pages
        page_count = size_bytes // PAGE_BYTES
        return [RangeSet([(ram.end_pfn - page_count, page_count)])]

    def unplug(self, pages: RangeSet) -> None:
        """Do nothing: the caller punches the memory out of the RAM file."""

    def evidence(self) -> str:
        """Return the end of the process's log."""
        return self._log.tail()

    def close(self) -> None:
        """Kill the process and free its memory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._waiter.join()
        self._process.close()
        self._log.close()
        self.ram.close()


def _make_ram(request: GuestRequest) -> GuestRam:
    spec = request.spec
    # Memory that is not plugged yet is a hole in the file, which costs nothing.
    size_bytes = max(spec.memory_bytes, spec.max_memory_bytes)
    fd = os.memfd_create(f"hintfleet-{request.name}", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise Refused(
            f"guest {request.name}: cannot make a RAM file of {format_size(size_bytes)}:"
            f" {error.strerror}"
        ) from error
    return GuestRam([_segment(0, spec.memory_bytes, fd)])


def _segment(pfn: int, size_bytes: int, fd: int) -> Segment:
    # The offset of a page in the RAM file is its guest physical address.
    page_count = size_bytes // PAGE_BYTES
    return Segment(pfn=pfn, page_count=page_count, fd=fd, offset_bytes=pfn * PAGE_BYTES)


def _open_ram(request: GuestRequest, handle: Handle, process: _Adopted) -> GuestRam:
    """Return the RAM of a guest that is being adopted.

    :raises GuestLost: the process has ended.
    :raises Refused: the RAM file cannot be opened.
    """
    # A memfd has no path of its own. The link in /proc opens the file that the process has open
    # (proc(5)).
    path = f"/proc/{process.pid}/fd/{handle['ram_fd']}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if process.has_ended():
            raise process.lost() from error
        raise Refused(
            f"guest {request.name}: cannot open its RAM file {path}: {error.strerror}",
            hint="run hintfleet-host as the user that made the guest",
        ) from error
    return GuestRam([_segment(0, handle["memory_bytes"], fd)])


class EmbeddedDriver:
    """Starts and adopts the processes of embedded guests; needs no privileges."""

    def __init__(
        self,
        server: str,
        survival: Survival | None = None,
        contain: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Store settings.

        :param server: the address at which guests reach this host agent.
        :param contain: called with the pid of each guest that is started, before the guest uses its
            RAM; puts the process into the cgroup of the host's budget, if there is one.
        """
        self._server = server
        self._survival = survival
        self._contain = contain

    def state(self) -> host_pb2.DriverState:
        """Return that this driver is usable: it needs processes and memfds only."""
        return host_pb2.DriverState(
            driver=host_pb2.EMBEDDED, usable=True, detail="processes on memfds"
        )

    def create(self, request: GuestRequest) -> EmbeddedGuest:
        """Start a guest process.

        :raises Refused: no embedded guest can have such settings, the RAM file cannot be so large,
            or the kernel refused to put the process into the cgroup.
        :raises InvalidInput: a setting is out of its bounds.
        :raises OSError: the log, the RAM file or the process cannot be made.
        """
        _check_settings(request.spec)
        config = agent_config(Driver.EMBEDDED, request, self._server, self._survival)
        with contextlib.ExitStack() as undo:
            log = self._log(request)
            undo.callback(log.close)
            ram = _make_ram(request)
            undo.callback(ram.close)
            memory_bytes = request.spec.memory_bytes
            config = replace(config, ram_fd=ram.only_fd(), memory_bytes=memory_bytes)
            popen = self._start(config, log)
            undo.callback(popen.wait)
            undo.callback(popen.kill)
            found = find_process(popen.pid)
            handle = {
                "pid": popen.pid,
                "start_ticks": found.start_ticks if found else 0,
                "ram_fd": ram.only_fd(),
            }
            undo.pop_all()
        return EmbeddedGuest(request, _Child(popen), ram, log, handle)

    def adopt(self, request: GuestRequest, handle: Handle) -> EmbeddedGuest:
        """Find the process and its RAM again.

        :raises GuestLost: the process has ended.
        :raises Refused: the RAM file cannot be opened.
        :raises OSError: the log cannot be opened, or no descriptor is free.
        """
        with contextlib.ExitStack() as undo:
            log = self._log(request)
            undo.callback(log.close)
            try:
                process = _Adopted(handle)
                undo.callback(process.close)
                ram = _open_ram(request, handle, process)
            except GuestLost as error:
                raise GuestLost(f"{error.message}: {log.tail()}") from error
            undo.pop_all()
        return EmbeddedGuest(request, process, ram, log, handle)

    def close(self) -> None:
        """Do nothing: this driver has no connection."""

    def _log(self, request: GuestRequest) -> GuestLog:
        return GuestLog(self._survival.folder / request.name if self._survival else None)

    def _start(self, config: AgentConfig, log: GuestLog) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "guest_agent", "--config", "-"],
            stdin=subprocess.PIPE,
            stdout=log.file,
            stderr=subprocess.STDOUT,
            pass_fds=(config.ram_fd,),
            # The terminal sends Ctrl-C to the host agent's whole process group. Guests that
            # survive the host agent get a session of their own, so that Ctrl-C does not end them.
            start_new_session=self._survival is not None,
        )
        try:
            self._contain(process.pid)
        except Refused:
            process.kill()
            process.wait()
            raise
        if process.stdin is not None:  # always true: stdin=PIPE
            # The write fails if the process has ended at once; the waiter thread reports that.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(config.to_json().encode() + b"\n")
                process.stdin.flush()
        return process


def _check_settings(spec: host_pb2.GuestSpec) -> None:
    if spec.method not in (host_pb2.NONE, host_pb2.HINTING):
        raise Refused(
            f"an embedded guest has no method {host_pb2.Method.Name(spec.method).lower()}",
            hint="driver: libvirt",
        )
    if spec.image:
        raise Refused("an embedded guest has no image", hint="driver: libvirt")
    if spec.node_count > 1:
        raise Refused("an embedded guest has one NUMA node", hint="driver: libvirt")

"""Embedded guests: a process each, whose RAM is a memfd of this host.

The host agent makes the memfd and keeps a descriptor of it, as it would have one
of QEMU's; so reclaim and accounting are the same as for a virtual machine.

By default a guest ends with its host agent, whose end of a pipe it watches. Under
Survival it ends only when it has had none for long; another host agent finds its
process by pid and start time, and its RAM among its files.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from threading import Thread
from typing import Protocol

from hintfleet.agent_config import AgentConfig, Memory
from hintfleet.errors import GuestLost, Refused
from hintfleet.ranges import RangeSet
from hintfleet.settings import Driver
from hintfleet.system.processes import find_process
from hintfleet.units import PAGE_BYTES, format_size
from hintfleet.v1 import host_pb2
from host_agent.guests.agent_settings import agent_config
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.guests.driver import GuestRequest, Handle, Survival
from host_agent.guests.guest_log import GuestLog
from host_agent.memory.ram import GuestRam, Segment


class _Process(Protocol):
    """A guest's process, whoever is its parent."""

    pid: int

    def wait(self) -> str:
        """Until it has ended; returns how."""

    def kill(self) -> None:
        """End it; `wait` returns soon. Nothing happens if it is gone."""

    def close(self) -> None:
        """Let go of it, after `wait`."""


class _Child:
    """A process that this host agent started."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self._popen = popen

    def wait(self) -> str:
        return f"ended with status {self._popen.wait()}"

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()


class _Adopted:
    """A process that an earlier host agent started: its status is not ours to have."""

    def __init__(self, handle: Handle) -> None:
        """:raises GuestLost: there is no such process any more."""
        self.pid = handle["pid"]
        try:
            self._fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise self.lost() from None
        # In this order: what has the start time now is what the descriptor stands for.
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
        self.has_ended(timeout_ms=None)
        return "ended"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._fd)


class EmbeddedGuest:
    """A running guest process."""

    balloon: Balloon | None = None
    reporting: Reporting | None = None

    def __init__(
        self, request: GuestRequest, process: _Process, ram: GuestRam, log: GuestLog, handle: Handle
    ) -> None:
        """Own all of them.

        :param handle: which process, and which of its files is the RAM.
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
        """Its size is nowhere to be seen: the RAM file is as large as the maximum."""
        return {**self._handle, "memory_bytes": self.ram.provisioned_bytes}

    def plugged(self) -> RangeSet:
        """What lies behind the memory that it started with."""
        return self.ram.pages - self._first

    def plug(self, size_bytes: int) -> list[Segment]:
        """The next part of the RAM file."""
        (ram,) = self.ram.pages
        return [_segment(ram.end_pfn, size_bytes, self.ram.only_fd())]

    def to_unplug(self, size_bytes: int) -> list[RangeSet]:
        """The end of the RAM."""
        (ram,) = self.ram.pages
        page_count = size_bytes // PAGE_BYTES
        return [RangeSet([(ram.end_pfn - page_count, page_count)])]

    def unplug(self, pages: RangeSet) -> None:
        """Nothing to take: the memory goes with the hole in the RAM file."""

    def evidence(self) -> str:
        """The end of what the guest process wrote."""
        return self._log.tail()

    def close(self) -> None:
        """Kill the process (its RAM holds nothing of worth) and free the memory."""
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
    size_bytes = max(spec.memory_bytes, spec.max_memory_bytes)  # sparse: costs nothing
    fd = os.memfd_create(f"hintfleet-{request.name}", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise Refused(
            f"guest {request.name}: a RAM file of {format_size(size_bytes)}: {error.strerror}"
        ) from error
    return GuestRam([_segment(0, spec.memory_bytes, fd)])


def _segment(pfn: int, size_bytes: int, fd: int) -> Segment:
    """A page of the guest lies in the RAM file where it lies in the guest."""
    page_count = size_bytes // PAGE_BYTES
    return Segment(pfn=pfn, page_count=page_count, fd=fd, offset_bytes=pfn * PAGE_BYTES)


def _open_ram(request: GuestRequest, handle: Handle, process: _Adopted) -> GuestRam:
    """The RAM of a guest that runs: it holds the file as well."""
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
    """Makes embedded guests; needs no privileges."""

    def __init__(self, server: str, survival: Survival | None = None) -> None:
        """:param server: the address at which guests reach this host agent."""
        self._server = server
        self._survival = survival

    def state(self) -> host_pb2.DriverState:
        """Always usable: a guest is a process."""
        return host_pb2.DriverState(
            driver=host_pb2.EMBEDDED, usable=True, detail="processes on memfds"
        )

    def create(self, request: GuestRequest) -> EmbeddedGuest:
        """Start a guest process.

        :raises Refused: an unknown setting, or the kernel refused the RAM file.
        :raises InvalidInput: a setting is out of its bounds.
        """
        _check_settings(request.spec)
        config = agent_config(Driver.EMBEDDED, request, self._server, self._survival)
        with contextlib.ExitStack() as undo:
            log = self._log(request)
            undo.callback(log.close)
            ram = _make_ram(request)
            undo.callback(ram.close)
            memory_bytes = request.spec.memory_bytes
            config = replace(
                config, memory=Memory.EMBEDDED, ram_fd=ram.only_fd(), memory_bytes=memory_bytes
            )
            popen = self._start(config, log)
            undo.pop_all()
        found = find_process(popen.pid)
        handle = {
            "pid": popen.pid,
            "start_ticks": found.start_ticks if found else 0,
            "ram_fd": ram.only_fd(),
        }
        return EmbeddedGuest(request, _Child(popen), ram, log, handle)

    def adopt(self, request: GuestRequest, handle: Handle) -> EmbeddedGuest:
        """Find the process and its RAM again.

        :raises GuestLost: it has ended.
        :raises Refused: its files cannot be looked into.
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
        """Nothing to let go of."""

    def _log(self, request: GuestRequest) -> GuestLog:
        return GuestLog(self._survival.folder / request.name if self._survival else None)

    def _start(self, config: AgentConfig, log: GuestLog) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "guest_agent", "--config", "-"],
            stdin=subprocess.PIPE,
            stdout=log.file,
            stderr=subprocess.STDOUT,
            pass_fds=(config.ram_fd,),
            # What ends the host agent's group (Ctrl-C) is not to end guests that survive it.
            start_new_session=self._survival is not None,
        )
        if process.stdin is not None:  # always: Popen was asked for a pipe
            with contextlib.suppress(BrokenPipeError):  # it died at once; the waiter tells
                process.stdin.write(config.to_json().encode() + b"\n")
                process.stdin.flush()
        return process


def _check_settings(spec: host_pb2.GuestSpec) -> None:
    if spec.method not in (host_pb2.NONE, host_pb2.HINTING):
        raise Refused(
            f"an embedded guest has no method {host_pb2.Method.Name(spec.method).lower()}",
            hint="driver: libvirt",
        )
    if spec.node_count > 1:
        raise Refused("an embedded guest has one NUMA node", hint="driver: libvirt")

"""Embedded guests: a process each, whose RAM is a memfd of this host.

The host agent makes the memfd and keeps a descriptor of it, as it would have one
of QEMU's; so reclaim and accounting are the same as for a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from threading import Thread
from typing import IO

from hintfleet.errors import Refused
from hintfleet.units import PAGE_BYTES, format_size
from hintfleet.v1 import host_pb2
from host_agent.balloon import Balloon
from host_agent.guests import GuestRequest
from host_agent.ram import GuestRam, Segment

_EVIDENCE_BYTES = 4096


class EmbeddedGuest:
    """A running guest process."""

    balloon: Balloon | None = None

    def __init__(self, request: GuestRequest, server: str) -> None:
        self._on_gone = request.on_gone
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.ram = _make_ram(request)
        try:
            self._process = self._start(request, server)
        except BaseException:
            self.ram.close()
            self._log.close()
            raise
        self.pid = self._process.pid
        self._waiter = Thread(target=self._wait, name=f"wait-{request.name}", daemon=True)
        self._waiter.start()

    def _start(self, request: GuestRequest, server: str) -> subprocess.Popen[bytes]:
        ram_fd = self.ram.only_fd()
        process = subprocess.Popen(
            [sys.executable, "-m", "guest_agent", "--config", "-"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(ram_fd,),
        )
        hinting = request.spec.hinting
        config = {
            "server": server,
            "guest_uuid": request.uuid,
            "token": request.token,
            "method": host_pb2.Method.Name(request.spec.method).lower(),
            "isolator": "embedded",
            "tracker": hinting.tracker,
            "chunk_order": hinting.chunk_order or 9,
            "threshold_chunks": hinting.threshold_chunks or 16,
            "memory": "embedded",
            "ram_fd": ram_fd,
            "memory_bytes": request.spec.memory_bytes,
        }
        # Stdin stays open: when the host agent dies, the guest sees its end and dies too.
        if process.stdin is not None:  # always: Popen was asked for a pipe
            with contextlib.suppress(BrokenPipeError):  # it died at once; the waiter tells
                process.stdin.write(json.dumps(config).encode() + b"\n")
                process.stdin.flush()
        return process

    def _wait(self) -> None:
        code = self._process.wait()
        self._on_gone(f"its process {self.pid} ended with status {code}: {self.evidence()}")

    def evidence(self) -> str:
        """The end of what the guest process wrote."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        start = max(0, size - _EVIDENCE_BYTES)
        text = os.pread(self._log.fileno(), _EVIDENCE_BYTES, start).decode(errors="replace")
        return text.strip() or "(it wrote nothing)"

    def close(self) -> None:
        """Kill the process (its RAM holds nothing of worth) and free the memory."""
        self._process.kill()
        self._waiter.join()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._log.close()
        self.ram.close()


def _make_ram(request: GuestRequest) -> GuestRam:
    size_bytes = request.spec.memory_bytes
    fd = os.memfd_create(f"hintfleet-{request.name}", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise Refused(
            f"guest {request.name}: a RAM file of {format_size(size_bytes)}: {error.strerror}"
        ) from error
    return GuestRam([Segment(pfn=0, page_count=size_bytes // PAGE_BYTES, fd=fd, offset_bytes=0)])


class EmbeddedDriver:
    """Makes embedded guests; needs no privileges."""

    def __init__(self, server: str) -> None:
        """:param server: the address at which guests reach this host agent."""
        self._server = server

    def state(self) -> host_pb2.DriverState:
        """Always usable: a guest is a process."""
        return host_pb2.DriverState(
            driver=host_pb2.EMBEDDED, usable=True, detail="processes on memfds"
        )

    def create(self, request: GuestRequest) -> EmbeddedGuest:
        """Start a guest process.

        :raises Refused: an unknown setting, or the kernel refused the RAM file.
        """
        _check_settings(request.spec)
        return EmbeddedGuest(request, self._server)

    def close(self) -> None:
        """Nothing to let go of."""


def _check_settings(spec: host_pb2.GuestSpec) -> None:
    if spec.method not in (host_pb2.NONE, host_pb2.HINTING):
        raise Refused(
            f"an embedded guest has no method {host_pb2.Method.Name(spec.method).lower()}",
            hint="driver: libvirt",
        )
    for what, value, allowed in (
        ("isolator", spec.hinting.isolator, ("", "embedded")),
        ("tracker", spec.hinting.tracker, ("", "bitmap", "reported")),
        ("policy", spec.hinting.policy, ("", "eager", "cold", "pressure")),
    ):
        if value not in allowed:
            raise Refused(
                f"an embedded guest has no {what} {value!r}",
                hint=f"{what}: {' or '.join(filter(None, allowed))}",
            )

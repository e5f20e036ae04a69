"""Measure how long QEMU would wait for the memory door to answer a stop while the guest's memory is
being punched, beside a back end that answers each message at once.

No QEMU runs: a front end in a process of its own sends QEMU's messages.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event, Thread

from hintfleet.ranges import RangeSet
from hintfleet.units import GIB, MIB
from host_agent.door.door import MemoryDoor
from host_agent.door.protocol import HEADER, Request
from host_agent.memory.fence import FenceClosed
from host_agent.memory.ram import GuestRam
from host_agent.threads import keep_latency_steady
from tests.bench.report import Figure, side_by_side
from tests.support.loops import running_loop

_ROUNDS = 5
_STOPS = 100
_SIZE = GIB

# A program that acts as QEMU: it starts and stops the device _STOPS times, and prints how long each
# stop took, in us.
_FRONT_END = f"""
import os, sys, time
from pathlib import Path
from tests.support.front_end import FrontEnd
qemu = FrontEnd(Path(sys.argv[1]))
qemu.negotiate()
if len(sys.argv) > 2:
    qemu.add(0, {_SIZE}, int(sys.argv[2]))
for _ in range({_STOPS}):
    qemu.start()
    time.sleep(0.02)
    began_ns = time.perf_counter_ns()
    qemu.ask_to_stop()
    qemu.wait_until_stopped()
    print((time.perf_counter_ns() - began_ns) / 1000, flush=True)
"""


def run() -> Iterator[Figure]:
    """Yield the median and the 99th percentile of the waits, under punches / bare back end."""
    keep_latency_steady()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = stack.enter_context(running_loop())
        punching, bare = [], []
        for number in range(_ROUNDS):
            punching.append(_while_punching(loop, folder / f"door-{number}"))
            bare.append(_bare(folder / f"bare-{number}"))
    for name, at in (("p50", 49), ("p99", 98)):
        pairs = [
            (_percentile(a, at), _percentile(b, at)) for a, b in zip(punching, bare, strict=True)
        ]
        wanted = "< 10,000" if name == "p99" else ""
        yield side_by_side(
            f"QEMU's wait at the door, {name}, under punches / bare back end", "us", pairs, wanted
        )


def _percentile(waits: list[float], at: int) -> float:
    return statistics.quantiles(waits, n=100)[at]


def _while_punching(loop: asyncio.AbstractEventLoop, path: Path) -> list[float]:
    """Return the waits in us while a thread fills and punches the guest's memory, 64 MiB at a
    time."""
    fd = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    os.truncate(fd, _SIZE)
    stop = Event()
    with closing(MemoryDoor.listening(loop, path, {os.geteuid()}, "bench")) as door:
        process = _front_end(path, fd)
        door.wait_until_open(30)
        with closing(GuestRam(door.segments(), door.fence)) as ram:
            punching = Thread(target=_punch, args=(ram, fd, stop))
            punching.start()
            waits = _waits(process)
            stop.set()
            punching.join()
    os.close(fd)
    return waits


def _punch(ram: GuestRam, fd: int, stop: Event) -> None:
    data = bytes(64 * MIB)
    while not stop.is_set():
        for at in range(0, _SIZE, len(data)):
            os.pwrite(fd, data, at)
            try:
                pages = RangeSet([(at // 4096, len(data) // 4096)])
                ram.punch(pages, ram.permit())
            except FenceClosed:
                time.sleep(0.001)


def _bare(path: Path) -> list[float]:
    """Return the waits in us for a back end that answers each message at once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        thread = Thread(target=_answer_at_once, args=(listener,))
        thread.start()
        waits = _waits(_front_end(path))
        thread.join()
    return waits


def _answer_at_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while header := connection.recv(HEADER.size, socket.MSG_WAITALL):
            request, _, size = HEADER.unpack(header)
            payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
            answer = {
                Request.GET_FEATURES: struct.pack("=Q", 1 << 30 | 1 << 32),
                Request.GET_PROTOCOL_FEATURES: bytes(8),
                Request.GET_MAX_MEM_SLOTS: struct.pack("=Q", 512),
                Request.GET_VRING_BASE: payload,
            }.get(request)
            if answer is not None:
                connection.sendall(HEADER.pack(request, 5, len(answer)) + answer)


def _front_end(path: Path, *fds: int) -> subprocess.Popen[str]:
    arguments = [os.fspath(path), *map(str, fds)]
    command = [sys.executable, "-c", _FRONT_END, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=fds)


def _waits(process: subprocess.Popen[str]) -> list[float]:
    out, _ = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(f"the front end ended with status {process.returncode}")
    return [float(line) for line in out.split()]

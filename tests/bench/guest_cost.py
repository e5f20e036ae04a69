"""Measure what an idle embedded guest (with its workload) and a real guest's idle agent, run on
this machine, cost: their memory and CPU time beside bare gRPC clients. Measure also the bytes on
the wire for each range that an embedded guest hints."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2
from tests.bench.report import Figure, side_by_side
from tests.bench.silent_host import silent_host
from tests.support.agents import HostAgent, running_host_agent

_START_S = 60.0
"""gRPC's threads poll, less and less often, for most of a minute after the last message."""
_IDLE_S = 30.0

_BARE_CLIENT = str(Path(__file__).with_name("in_guest") / "bare_client.py")


def run() -> Iterator[Figure]:
    """Yield the bytes on the wire for each hinted range, then memory (without the guest's RAM) and
    CPU of an idle embedded guest that has used and freed 64 MiB ten times, and of the agent of a
    real guest with nothing to do.

    The embedded guest contains more than an agent: the workload with its pattern, and the
    allocator.
    """
    with running_host_agent() as host:
        host.watch()
        guest = host.create()
        for _ in range(10):
            host.allocate(64 * MIB)
            host.free(64 * MIB)
        host.settle()
        yield _wire(host)
        with silent_host() as port, contextlib.ExitStack() as undo:
            server = f"127.0.0.1:{port}"
            embedded = guest.pid
            agent = undo.enter_context(_running("-m", "tests.bench.idle_agent", server))
            aio = undo.enter_context(_running(_BARE_CLIENT, "aio", server))
            sync = undo.enter_context(_running(_BARE_CLIENT, "sync", server))
            time.sleep(_START_S)
            memory, idle = _at_rest(embedded, agent, aio, sync)
    for bare, kind in ((aio, "aio"), (sync, "sync")):
        for ours, name in ((embedded, "embedded guest with its workload"), (agent, "idle agent")):
            yield side_by_side(
                f"{name} / bare {kind} client, memory", "MiB", [(memory[ours], memory[bare])]
            )
            yield side_by_side(
                f"{name} / bare {kind} client, idle",
                "% of a core",
                [(idle[ours], idle[bare])],
                "ours < 0.1",
            )


@contextlib.contextmanager
def _running(*arguments: str) -> Iterator[int]:
    """Run a Python process; yield its pid; kill it at the end of the block."""
    process = subprocess.Popen([sys.executable, *arguments])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _at_rest(*pids: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return each process's memory in MiB, and its CPU in % of a core over _IDLE_S."""
    before_s = {pid: _cpu_s(pid) for pid in pids}
    time.sleep(_IDLE_S)
    idle = {pid: 100 * (_cpu_s(pid) - before_s[pid]) / _IDLE_S for pid in pids}
    return {pid: _private_mib(pid) for pid in pids}, idle


def _wire(host: HostAgent) -> Figure:
    ledger: host_pb2.Ledger = host.guests()["g"].ledger
    return Figure(
        name=f"wire, {ledger.ranges} ranges of a fragmented guest",
        unit="bytes for each range",
        ours=ledger.wire_bytes / ledger.ranges,
        wanted="<= 3",
    )


def _private_mib(pid: int) -> float:
    """Return the RSS of anonymous memory and files, in MiB. Shared memory is left out, because it
    is the guest's RAM."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith(("RssAnon", "RssFile"))
    )
    return sum(int(value.split()[0]) for value in fields.values()) * KIB / MIB


def _cpu_s(pid: int) -> float:
    """Return the CPU time of all threads that have not ended, in s, from the scheduler's counters
    of nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

"""What a guest agent costs: memory against a bare gRPC client, idle CPU, bytes on the wire."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2
from tests.bench.report import Figure, side_by_side
from tests.support.agents import HostAgent, running_host_agent

_IDLE_S = 10.0

_BARE_CLIENT = """
import sys, threading, grpc
from hintfleet.v1 import host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceStub
call = HostServiceStub(grpc.insecure_channel(sys.argv[1])).Watch(
    host_pb2.WatchRequest(trial_id="bare", period_ms=1000000))
next(call)
print("ready", flush=True)
for _ in call:
    pass
"""


def run() -> Iterator[Figure]:
    """RSS and CPU of an embedded guest that has hinted 640 MiB and is idle.

    It holds more than an agent: the workload with its pattern, and the allocator. The
    agent alone is measured in a real guest.
    """
    with running_host_agent() as host:
        host.watch()
        # Its RAM is another process's file, so that only the agent itself counts.
        guest = host.create()
        for _ in range(10):
            host.allocate(64 * MIB)
            host.free(64 * MIB)
        host.settle()
        yield _wire(host)
        bare = subprocess.Popen(
            [sys.executable, "-c", _BARE_CLIENT, host.control], stdout=subprocess.PIPE
        )
        try:
            if bare.stdout is not None:
                bare.stdout.readline()
            pids = (guest.pid, bare.pid)
            before_s = [_cpu_s(pid) for pid in pids]
            time.sleep(_IDLE_S)
            idle = [100 * (_cpu_s(p) - b) / _IDLE_S for p, b in zip(pids, before_s, strict=True)]
            memory = [_private_mib(pid) for pid in pids]
        finally:
            bare.kill()
            bare.wait()
        yield side_by_side(
            "embedded guest with its workload / bare gRPC client, memory",
            "MiB",
            [(memory[0], memory[1])],
        )
        yield side_by_side(
            "embedded guest, idle / bare gRPC client",
            "% of a core",
            [(idle[0], idle[1])],
            "ours < 0.1",
        )


def _wire(host: HostAgent) -> Figure:
    ledger: host_pb2.Ledger = host.guests()["g"].ledger
    return Figure(
        name=f"wire, {ledger.ranges} ranges of a fragmented guest",
        unit="bytes a range",
        ours=ledger.wire_bytes / ledger.ranges,
        wanted="<= 3",
    )


def _private_mib(pid: int) -> float:
    """Anonymous memory and files, without shared memory: the guest's RAM is not the agent's."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith(("RssAnon", "RssFile"))
    )
    return sum(int(value.split()[0]) for value in fields.values()) * KIB / MIB


def _cpu_s(pid: int) -> float:
    """User and system time, from the scheduler's own nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

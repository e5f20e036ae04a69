"""Measure a host agent's CPU time for each guest while its guests rest, and while one of them
churns: it uses and frees memory again and again. Then measure idle sessions (sessions.py).

While the guests rest and churn, a Watch with a period of one second is open. The cost of the
benchmark's own commands (measured with commands of zero bytes) is subtracted from the cost of
churn. If the host agent itself punches (method hinting), the cost of the punches is subtracted, too
(measured by punching in this process).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.memory.ram import GuestRam, Segment
from tests.bench.flood import cpu_s
from tests.bench.real_guests import can_have_real_guests
from tests.bench.report import Figure
from tests.bench.sessions import idle_sessions
from tests.support.agents import TRIAL, HostAgent, running_host_agent
from tests.support.vm import Guests, spec

_WATCH_PERIOD_MS = 1000
_WORKED_BYTES = 400 * MIB
_CALM_DOWN_S = 30.0
_REST_S = 60.0
_CHURN_BYTES = 64 * MIB
_CHURN_PERIOD_S = 0.5
_CHURN_ROUNDS = 40
_REAL_GUESTS = 3
_EMBEDDED_GUESTS = 200
_SESSIONS = (1000, 2000)

_ARMS: Mapping[str, host_pb2.GuestSpec] = {
    "kmod": spec(),
    "hugetlb": spec(isolator="hugetlb", parameters="init_on_alloc=0"),
    "reporting": spec(host_pb2.REPORTING),
    "balloon": spec(host_pb2.BALLOON),
}
_EMBEDDED = host_pb2.GuestSpec(
    driver=host_pb2.EMBEDDED,
    memory_bytes=128 * MIB,
    method=host_pb2.HINTING,
    hinting=host_pb2.HintingSettings(tracker="bitmap"),
)


def run() -> Iterator[Figure]:
    """Yield figures of three real guests of each arm, of embedded guests, and of idle sessions.
    Leave out the real guests if libvirt-python or the guest image is missing."""
    punch_s_per_byte = _punch_s_per_byte()
    if can_have_real_guests():
        for arm, wanted in _ARMS.items():
            yield from _real(arm, wanted, punch_s_per_byte)
    yield from _embedded(punch_s_per_byte)
    for count in _SESSIONS:
        yield from idle_sessions(count)


def _real(arm: str, wanted: host_pb2.GuestSpec, punch_s_per_byte: float) -> Iterator[Figure]:
    with running_host_agent() as host:
        _watch(host)
        names = [f"{arm}{n}" for n in range(_REAL_GUESTS)]
        guests = Guests(host, dict.fromkeys(names, wanted))
        guests.wait()
        for name in names:
            guests[name]
            host.allocate(_WORKED_BYTES, name)
            host.free(_WORKED_BYTES, name)
        time.sleep(_CALM_DOWN_S)
        yield from _rest_and_churn(f"a real guest, {arm}", host, names, "<= 0.1", punch_s_per_byte)


def _embedded(punch_s_per_byte: float) -> Iterator[Figure]:
    # The cost of 200 guests at rest varies by more than one guest's churn costs. So rest is
    # measured with 200 guests, churn with one.
    for count, which in ((_EMBEDDED_GUESTS, 0), (1, 1)):
        with running_host_agent() as host:
            _watch(host)
            names = [f"g{n}" for n in range(count)]
            Guests(host, dict.fromkeys(names, _EMBEDDED)).wait()
            time.sleep(_CALM_DOWN_S)
            figures = _rest_and_churn("an embedded guest", host, names, "<= 0.05", punch_s_per_byte)
            yield next(itertools.islice(figures, which, None))


def _rest_and_churn(
    what: str, host: HostAgent, names: Sequence[str], wanted: str, punch_s_per_byte: float
) -> Iterator[Figure]:
    with _Share(host) as rest:
        time.sleep(_REST_S)
    yield Figure(
        name=f"host agent at rest, for {what} of {len(names)}",
        unit="% of a core",
        ours=100 * rest.of_a_core / len(names),
        wanted=wanted,
    )
    # The host agent passes on the benchmark's commands. Their cost is not churn, and is subtracted.
    # With it, the cost of all guests at rest is subtracted; that of one guest is added again.
    with _Share(host) as commands:
        _use_and_free(0, host, names[0])
    before = host.guests()[names[0]].ledger.reclaimed_total_bytes
    with _Share(host) as churn:
        _use_and_free(_CHURN_BYTES, host, names[0])
    guest = host.guests()[names[0]]
    # Under reporting and balloon, QEMU punches, not the host agent.
    ours = guest.spec.method == host_pb2.HINTING
    punched = (guest.ledger.reclaimed_total_bytes - before) if ours else 0
    punches = punched * punch_s_per_byte / churn.elapsed_s
    at_rest = rest.of_a_core / len(names)
    yield Figure(
        name=f"host agent, for {what} that uses and frees {_CHURN_BYTES // MIB} MiB "
        f"{_CHURN_ROUNDS / churn.elapsed_s:.1f} times a second, without the punches",
        unit="% of a core",
        ours=100 * (churn.of_a_core - commands.of_a_core + at_rest - punches),
        wanted="<= 3",
    )


class _Share:
    """Measures which share of a core the host agent uses during a `with` block."""

    def __init__(self, host: HostAgent) -> None:
        self._pid = host.process.pid

    def __enter__(self) -> Self:
        self._started_s, self._spent_s = time.monotonic(), cpu_s(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.elapsed_s = time.monotonic() - self._started_s
        self.of_a_core = (cpu_s(self._pid) - self._spent_s) / self.elapsed_s


def _use_and_free(size_bytes: int, host: HostAgent, name: str) -> None:
    next_s = time.monotonic()
    for _ in range(_CHURN_ROUNDS):
        host.allocate(size_bytes, name)
        host.free(size_bytes, name)
        # After a round that took longer than its period, the next one begins at once; the lost
        # time is not caught up.
        now_s = time.monotonic()
        next_s = max(next_s + _CHURN_PERIOD_S, now_s)
        time.sleep(next_s - now_s)


def _punch_s_per_byte() -> float:
    """Return the CPU time in s for each punched byte: of the punches alone, without the rest of a
    host agent. Another process writes the memory, so that the caches are cold, as in a host
    agent."""
    fd = os.memfd_create("bench")
    os.truncate(fd, _CHURN_BYTES)
    ram = GuestRam([Segment(pfn=0, page_count=_CHURN_BYTES // PAGE_BYTES, fd=fd, offset_bytes=0)])
    chunks = RangeSet((pfn, 512) for pfn in range(0, _CHURN_BYTES // PAGE_BYTES, 1024))
    rest = ram.pages - chunks
    took_s = 0.0
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(fd)],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for _ in range(_CHURN_ROUNDS):
            writer.stdin.write(b"\n")
            writer.stdin.flush()
            writer.stdout.readline()
            time.sleep(_CHURN_PERIOD_S / 2)
            started_s = time.thread_time()
            for half in (chunks, rest):
                ram.punch(half, ram.permit())
            took_s += time.thread_time() - started_s
        writer.stdin.close()
    ram.close()
    return took_s / (_CHURN_ROUNDS * _CHURN_BYTES)


_WRITER = """
import mmap, sys
ram = mmap.mmap(int(sys.argv[1]), 0)
for line in sys.stdin:
    ram[:] = b"x" * len(ram)
    print(flush=True)
"""


def _watch(host: HostAgent) -> None:
    """Keep the guests alive with a Watch, as an experiment does."""
    request = host_pb2.WatchRequest(trial_id=TRIAL, period_ms=_WATCH_PERIOD_MS)
    stream = host.stub.Watch(request, timeout=1800)
    next(iter(stream))

    def read() -> None:
        try:
            for _ in stream:
                pass
        except Exception:  # noqa: BLE001 - the host agent ends with the block that started it
            return

    threading.Thread(target=read, daemon=True).start()

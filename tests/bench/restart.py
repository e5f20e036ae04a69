"""Measure the recovery from a killed host agent: the time from the start of its successor until
every guest has given memory back to the successor."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc

from hintfleet.units import MIB
from tests.bench.report import Figure
from tests.support.agents import HostAgent, running_host_agent

_ROUNDS = 5
_GUESTS = [f"g{n}" for n in range(8)]
_FREED_BYTES = 16 * MIB
_T = TypeVar("_T")


def run() -> Iterator[Figure]:
    """Yield a figure of a restart at once, and one of a restart after 10 s, in which the guests
    have tried to connect in vain."""
    for away_s in (0.0, 10.0):
        taken_s = [_seconds_to_go_on(away_s) for _ in range(_ROUNDS)]
        yield Figure(
            name=f"restart after {away_s:g} s: until {len(_GUESTS)} guests are acknowledged",
            unit="s",
            ours=statistics.median(taken_s),
            rounds=_ROUNDS,
            wanted="< 5",
        )


def _seconds_to_go_on(away_s: float) -> float:
    with tempfile.TemporaryDirectory(prefix="hf-bench-") as folder:
        arguments = ("--listen", f"unix:{folder}/host.sock", "--state", f"{folder}/state")
        with running_host_agent(*arguments) as first:
            first.watch()
            for name in _GUESTS:
                first.create(name)
                first.allocate(_FREED_BYTES, name)
            first.process.kill()
            first.process.wait()
        time.sleep(away_s)
        started_s = time.monotonic()
        with running_host_agent(*arguments) as second, ThreadPoolExecutor(len(_GUESTS)) as pool:
            second.watch()
            for reclaimed_bytes in pool.map(lambda name: _give_back(second, name), _GUESTS):
                assert reclaimed_bytes == _FREED_BYTES
            return time.monotonic() - started_s


def _give_back(host: HostAgent, name: str) -> int:
    _retried(lambda: host.free(_FREED_BYTES, name))
    return _retried(lambda: host.settle(name)).ledger.reclaimed_now_bytes


def _retried(call: Callable[[], _T]) -> _T:
    """Repeat a call until the guest has connected again, and return its result. Before that, the
    call fails with UNAVAILABLE and has no effect."""
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.01)

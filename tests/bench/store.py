"""Measure the store with 10 million samples: how fast they are stored, the latency of queries of
savings over gRPC, the CPU time of exports beside a bare copy by DuckDB, and their memory beside
that of exports of 1 million samples.

The samples are of 1,000 guests on 100 hosts, in 10 trials of one run. The code that stores a real
run stores them, in parts of 2 s, and each trial's figures.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hintfleet.units import KIB, MIB
from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.results.savings import By
from orchestrator.results.store import samples as parts
from orchestrator.results.store.reader import Store
from orchestrator.results.store.writer import RunHeader, RunWriter
from orchestrator.service.messages import BY_PB2
from orchestrator.spec.file import parse
from orchestrator.trial.plan import HostTask, plan_trials
from orchestrator.trial.records import Record, columns_of
from tests.bench.flood import cpu_s
from tests.bench.report import Figure, side_by_side
from tests.support.stored import S, guest_records, samples, store_trial

_SPEC = """
name: many-samples
driver: embedded
hosts: {count: 100, memory: 10GiB}
guests: {per_host: 10, memory: 1GiB}
workload: {phases: [{allocate: 50%, for: 98s}]}
arms: [{name: none, method: none}, {name: bitmap, method: hinting}]
repetitions: 5
"""
_SAMPLES_PER_GUEST = 1000
_SAMPLES_PER_PART = 20
_SAMPLE_PERIOD_US = S // 10
_QUERIES = 300
_TIMEOUT_S = 60
_EXPORTS = 3
_BARE_COPY = """
import duckdb, sys
folder, kind, path = sys.argv[1:]
database = duckdb.connect(config={"threads": 1, "temp_directory": ""})
database.execute("SET enable_progress_bar = false")
rows = f"SELECT * FROM read_parquet('{folder}/samples/*/*/*.parquet')"
database.execute(f"COPY ({rows}) TO '{path}' (FORMAT {kind})")
"""
# A small process that starts the one to measure: the kernel begins the peak of a process with that
# of the process which started it (ru_maxrss, getrusage(2)), and a benchmark has used much memory.
_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=sys.stderr, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def run() -> Iterator[Figure]:
    """Yield the rate at which samples are stored, the latency of queries, and the CPU time and the
    memory of exports. Needs 5 GB in the temporary folder."""
    with tempfile.TemporaryDirectory(prefix="hf-bench-") as place:
        small, large = Path(place) / "small", Path(place) / "large"
        _store(small, trial_count=1)
        started_s = time.monotonic()
        count = _store(large, trial_count=10)
        taken_s = time.monotonic() - started_s
        yield Figure(
            name=f"{count / 1e6:g} million samples stored", unit="1/s", ours=count / taken_s
        )
        yield from _queries(large)
        for kind in ("csv", "parquet"):
            yield from _exports(small, large, kind, Path(place) / f"exported.{kind}")


def _store(folder: Path, trial_count: int) -> int:
    """Store a run of `trial_count` trials; return the number of its samples."""
    spec = parse(_SPEC, "spec").spec
    header = RunHeader(run_id="run1", spec=spec, spec_text=_SPEC, summary="")
    with Store(folder) as store:
        with RunWriter(store, header) as writer:
            for trial in plan_trials(spec, header.run_id)[:trial_count]:
                store_trial(writer, trial, spec, _records)
        return sum(trial.sample_count for trial in store.trials(header.run_id))


def _records(tasks: Mapping[str, HostTask]) -> Iterator[Record]:
    """Yield the samples of all hosts, slice of time by slice of time, then their events."""
    chance = np.random.default_rng(1)
    names = columns_of([]).keys() - {"at_unix_us", "guest"}
    now_s = time.monotonic()
    # The writer begins a part every 2 s of its clock. Here this clock follows the samples' times.
    with mock.patch.object(parts, "time", SimpleNamespace(monotonic=lambda: now_s)):
        for first in range(0, _SAMPLES_PER_GUEST, _SAMPLES_PER_PART):
            times_us = np.arange(first, first + _SAMPLES_PER_PART) * _SAMPLE_PERIOD_US
            now_s += _SAMPLES_PER_PART * _SAMPLE_PERIOD_US / S
            for task in tasks.values():
                shape = len(names), len(times_us) * len(task.guests)
                values = chance.integers(0, 1 << 16, shape) * 4 * KIB
                yield samples(task, times_us, **dict(zip(names, values, strict=True)))
    end_s = _SAMPLES_PER_GUEST * _SAMPLE_PERIOD_US / S
    for task in tasks.values():
        yield from guest_records(task, end_s)


def _queries(folder: Path) -> Iterator[Figure]:
    with _serving(folder) as (pid, address), grpc.insecure_channel(address) as channel:
        service = fleet_pb2_grpc.FleetServiceStub(channel)
        bare = health_pb2_grpc.HealthStub(channel)
        for by in By:
            request = fleet_pb2.QuerySavingsRequest(by=BY_PB2[by])
            ask = partial(service.QuerySavings, request, timeout=_TIMEOUT_S)
            name = f"savings by {by}, {len(ask().rows)} rows"
            check = partial(bare.Check, health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
            before_s = cpu_s(pid)
            taken_ms = [(_milliseconds(ask), _milliseconds(check)) for _ in range(_QUERIES)]
            spent_s = cpu_s(pid) - before_s
            ours, other = map(_p99, zip(*taken_ms, strict=True))
            yield Figure(
                name=f"{name} / bare call, 99th percentile",
                unit="ms",
                ours=ours,
                other=other,
                ratio=ours / other,
                rounds=_QUERIES,
                wanted="" if by is By.GUEST else "< 50 ms",
            )
            yield Figure(
                name=f"{name}, CPU time of the service",
                unit="ms",
                ours=spent_s / _QUERIES * 1000,
                rounds=_QUERIES,
            )


def _p99(values: tuple[float, ...]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _milliseconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return (time.perf_counter() - started_s) * 1000


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[int, str]]:
    """Serve the store; yield the process id and the address of the service."""
    command = [sys.executable, "-m", "orchestrator", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--data-dir", folder], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        try:
            yield server.pid, server.stderr.readline().split()[-1]  # line: serving on ADDRESS
        finally:
            server.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class _Used:
    """What a process used until its end. Its peak is never less than that of `_MEASURE`."""

    cpu_s: float
    peak_mib: float


def _used(*command: str | Path) -> _Used:
    measure = [sys.executable, "-c", _MEASURE, sys.executable, *command]
    done = subprocess.run(measure, stdout=subprocess.PIPE, text=True, check=True)
    used_s, peak_kib = done.stdout.split()
    return _Used(float(used_s), int(peak_kib) * KIB / MIB)


def _exports(small: Path, large: Path, kind: str, path: Path) -> Iterator[Figure]:
    def export(folder: Path) -> _Used:
        return _used("-m", "orchestrator", "export", "--data-dir", folder, "-o", kind, "--to", path)

    rounds = [(export(large), _used("-c", _BARE_COPY, large, kind, path)) for _ in range(_EXPORTS)]
    yield side_by_side(
        f"export as {kind} / bare copy without parameters, CPU time",
        "s",
        [(ours.cpu_s, bare.cpu_s) for ours, bare in rounds],
    )
    yield side_by_side(
        f"export as {kind}, memory, 10 million samples / 1 million",
        "MiB",
        [(ours.peak_mib, export(small).peak_mib) for ours, _ in rounds],
        wanted="< 1.5",
    )

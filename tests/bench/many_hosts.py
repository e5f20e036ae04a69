"""Measure what `hintfleet run` costs with 1,000 hosts of 10 guests each and a sample of each guest
per second: CPU and memory of the command, of its actors and of Ray, and whether samples are lost.

The hosts are gRPC servers that speak the control API (fake_host_service.py), in a few processes:
what is measured is the orchestrator.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import duckdb

from hintfleet.units import MIB, PAGE_BYTES
from tests.bench.flood import cpu_s, process
from tests.bench.report import Figure
from tests.support.lab import Lab, made_lab

_GUESTS_PER_HOST = 10
_FAKE_PROCESSES = 4
_HOLD_S = 40
_SETTLE_DOWN_S = 5
_MEASURED_S = 30
_SPEC = """\
name: many-hosts
driver: embedded
hosts: {{agents: [{agents}]}}
guests: {{per_host: {guests}, memory: 1GiB}}
workload:
  phases:
    - {{allocate: 512MiB, for: {hold}s}}
    - {{free: 50%, for: 5s}}
arms:
  - {{name: none, method: none}}
sample_period: 1s
timeouts: {{connect: 5min, create: 5min, step: 5min, destroy: 5min}}
"""


@dataclass(frozen=True, kw_only=True)
class _Spent:
    """CPU seconds and resident bytes of the processes of a run, by kind."""

    cpu_s: dict[str, float]
    rss_bytes: dict[str, int]
    actors: int


def run(hosts: int = 1000) -> Iterator[Figure]:
    """Yield the figures of one run with this number of hosts.

    :raises AssertionError: the run failed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-many-")))
        lab = stack.enter_context(made_lab(folder))
        share = -(-hosts // _FAKE_PROCESSES)
        fakes = [
            stack.enter_context(_fakes(folder, first, min(share, hosts - first)))
            for first in range(0, hosts, share)
        ]
        _wait_for(fakes, "serving")
        agents = ", ".join(f"'unix:{folder}/{number}'" for number in range(hosts))
        spec = lab.spec(_SPEC.format(agents=agents, guests=_GUESTS_PER_HOST, hold=_HOLD_S))
        began_s = time.monotonic()
        command = stack.enter_context(lab.started("run", spec, "-o", "json"))
        _wait_for(fakes, "step")
        ready_s = time.monotonic() - began_s
        time.sleep(_SETTLE_DOWN_S)
        before, before_s = _spent(lab, command.pid), time.monotonic()
        time.sleep(_MEASURED_S)
        after, elapsed_s = _spent(lab, command.pid), time.monotonic() - before_s
        for _ in range(2):  # the steps that follow: free, verify
            _wait_for(fakes, "step")
        ending_s = time.monotonic()
        out, err = command.communicate()
        ending_s = time.monotonic() - ending_s
        assert command.returncode == 0, err + out
        rows, lost, per_s = _stored(lab)
    what = f"{hosts} hosts of {_GUESTS_PER_HOST} guests"
    yield Figure(name=f"{what}: samples stored", unit="1", ours=rows)
    yield Figure(name=f"{what}: samples lost", unit="1", ours=lost, wanted="0")
    yield Figure(name=f"{what}: samples", unit="1/s", ours=per_s)
    yield Figure(name=f"{what}: until all have allocated", unit="s", ours=ready_s)
    yield Figure(name=f"{what}: from the last step to the result", unit="s", ours=ending_s)
    yield from _figures(what, hosts, before, after, elapsed_s)


def _figures(
    what: str, hosts: int, before: _Spent, after: _Spent, elapsed_s: float
) -> Iterator[Figure]:
    total_s = 0.0
    for kind, spent_s in after.cpu_s.items():
        used_s = spent_s - before.cpu_s[kind]
        total_s += used_s
        yield Figure(
            name=f"{what}: CPU of {kind}", unit="% of a core", ours=100 * used_s / elapsed_s
        )
        yield Figure(name=f"{what}: memory of {kind}", unit="MiB", ours=after.rss_bytes[kind] / MIB)
    yield Figure(name=f"{what}: actors", unit="1", ours=after.actors)
    yield Figure(
        name=f"{what}: CPU of all for each host and second",
        unit="ms",
        ours=1000 * total_s / elapsed_s / hosts,
        wanted="<= 1, for 1,000",
    )


def _fakes(folder: Path, first: int, count: int) -> AbstractContextManager[subprocess.Popen[str]]:
    words = (str(folder), str(first), str(count), str(_GUESTS_PER_HOST))
    return process("tests.support.fake_host_service", *words)


def _wait_for(fakes: list[subprocess.Popen[str]], word: str) -> None:
    for fake in fakes:
        said = cast(IO[str], fake.stdout).readline()
        assert said == f"{word}\n", said


def _spent(lab: Lab, command_pid: int) -> _Spent:
    actors = lab.find("ray::_HostActor")
    others = set(lab.processes()) - {command_pid, *actors}
    kinds = {"the command": [command_pid], "its actors": actors, "Ray": list(others)}
    return _Spent(
        cpu_s={kind: sum(map(cpu_s, pids)) for kind, pids in kinds.items()},
        rss_bytes={kind: sum(map(_rss_bytes, pids)) for kind, pids in kinds.items()},
        actors=len(actors),
    )


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def _stored(lab: Lab) -> tuple[int, int, float]:
    """Return how many samples are stored, how many are missing, and how many came per second. The
    missing ones are gaps in `batches`, in which a fake host numbers each guest's samples."""
    with duckdb.connect() as connection:
        (row,) = connection.execute(
            "SELECT sum(n), sum(last - n), 1e6 * sum(n) / (max(ended) - min(began)) FROM ("
            "SELECT count(*) AS n, max(batches) AS last, min(at_unix_us) AS began, "
            "max(at_unix_us) AS ended FROM read_parquet(?) GROUP BY guest)",
            [f"{lab.folder}/hintfleet/samples/*/*/*.parquet"],
        ).fetchall()
    return int(row[0]), int(row[1]), float(row[2])


if __name__ == "__main__":
    for figure in run(int(sys.argv[1])):
        print(figure)

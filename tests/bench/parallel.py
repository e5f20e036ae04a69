"""Measure the parallel efficiency of a run: how long a trial takes on one host of this machine,
divided by how long it takes on four, each of which does the same work.

With a workload that waits most of the time, as guests in experiments do, four hosts take longer
only by what the orchestrator and the host agents need. With a workload that always works, the
efficiency depends mostly on the number of cores: four hosts on two cores cannot reach more than
0.5.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from tests.bench.report import Figure, side_by_side
from tests.support.lab import Lab, made_lab

_ROUNDS = 3
_HOSTS = 4
_WORKLOADS = {
    "waits": "[{allocate: 96MiB, for: 1s}, {free: 75%, for: 2s}, {repeat: 4}]",
    "works": "[{allocate: 128MiB}, {free: 100%}, {repeat: 8}]",
}
_SPEC = """\
name: parallel
driver: embedded
hosts: {{count: {hosts}, memory: 1GiB}}
guests: {{per_host: 1, memory: 512MiB}}
workload: {{phases: {phases}}}
arms:
  - {{name: none, method: none}}
  - {{name: hinting, method: hinting}}
repetitions: 2
"""


def run() -> Iterator[Figure]:
    """Yield the efficiency of each workload. Runs with one host and with four take turns."""
    cores = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="hf-parallel-") as folder,
        made_lab(Path(folder)) as lab,
    ):
        for kind, phases in _WORKLOADS.items():
            pairs = [
                (_trial_s(lab, phases, 1), _trial_s(lab, phases, _HOSTS)) for _ in range(_ROUNDS)
            ]
            allowed = 1.0 if kind == "waits" else min(1.0, cores / _HOSTS)
            yield side_by_side(
                f"a trial on 1 host / on {_HOSTS} hosts, each guest {kind} ({cores} cores)",
                "s",
                pairs,
                f">= {0.95 * allowed:.3g}",
            )


def _trial_s(lab: Lab, phases: str, hosts: int) -> float:
    """Run _SPEC with these phases on so many hosts; return the mean duration of a trial, in s, from
    before its guests are created until its figures are computed."""
    done = lab.run("run", lab.spec(_SPEC.format(hosts=hosts, phases=phases)), "-o", "json")
    assert done.returncode == 0, done.stderr
    trials: list[dict[str, Any]] = json.loads(done.stdout)["trials"]
    return mean(float(t["ended_unix_us"] - t["started_unix_us"]) for t in trials) / 1e6

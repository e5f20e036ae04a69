"""The live view: if there are few hosts, each has a line; if there are many, all hosts in the same
phase share one. No line is wider than the terminal."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from hintfleet.units import MIB
from orchestrator.results.store.writer import RunHeader
from orchestrator.trial.plan import plan_trials
from orchestrator.trial.records import PhaseStarted, Samples
from orchestrator.view.live import LiveView
from tests.support.stored import QUICKSTART

BEHIND = "host17"


def begun(host: str, title: str) -> PhaseStarted:
    return PhaseStarted(host=host, trial_id="t", at_unix_us=1, title=title, hold_s=0)


def samples(host: str, *resident_mib: int) -> Samples:
    count = len(resident_mib)
    return Samples(
        trial_id="t",
        columns={
            "host": np.array([host] * count, dtype=object),
            "at_unix_us": np.arange(count),
            "guest": np.array([f"{host}-guest1"] * count, dtype=object),
            "resident_bytes": np.array(resident_mib, dtype=np.uint64) * MIB,
            "provisioned_bytes": np.full(count, 100 * MIB, dtype=np.uint64),
        },
    )


def shown(hosts: int, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=200, force_terminal=False)
    view = LiveView(console)
    spec = QUICKSTART
    header = RunHeader(run_id="r", spec=spec, spec_text="", summary="a test")
    trials = plan_trials(spec, "r")
    view.starting(header, trials, {})
    view.trial_started(trials[0])
    for number in range(1, hosts + 1):
        host = f"host{number}"
        view.record(begun(host, "allocate 192 MiB"))
        view.record(samples(host, 10, 50))
        if host != BEHIND:
            view.record(begun(host, "free 75 %"))
    with console.capture() as captured:
        console.print(view._render())
    view.close()
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_many_hosts_are_folded_and_the_one_that_is_behind_is_named(width: int) -> None:
    lines = shown(40, width)
    assert all(len(line) <= width for line in lines)
    of_hosts = [line for line in lines if line.startswith("host")]
    assert [line.split()[0] for line in of_hosts] == [BEHIND, "host1"], "the slowest first"
    if width >= 80:
        behind, others = of_hosts
        assert re.search(r"50 MiB of 100 MiB +allocate", behind)
        assert re.search(r"host1 and 38 more .*1\.90 GiB of 3\.81 GiB +free", others)


def test_few_hosts_have_a_line_each() -> None:
    lines = shown(3, 100)
    of_hosts = [line for line in lines if line.startswith("host")]
    assert [line.split()[0] for line in of_hosts] == ["host1", "host2", "host3"]
    assert all("50 MiB of 100 MiB" in line for line in of_hosts)

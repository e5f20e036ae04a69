"""Runs continue, or are resumed, after host agents, actors or the orchestrator were killed."""

import json
import os
import random
import signal
import sqlite3
import subprocess
from typing import Any

import duckdb
import pytest

from tests.support.agents import wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, parent_pid, result, wait_for_line

SPEC = """\
name: tiny
driver: embedded
hosts: {count: 2, memory: 256MiB}
guests: {per_host: 1, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB, for: 700ms}
    - {free: 75%, for: 700ms, settle: true}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap, report_period: 50ms}
repetitions: 2
seed: 1
sample_period: 50ms
"""
SEED = 20260
KILLS = 2
Part = tuple[str, int, int]


def kill_one(lab: Lab, what: str) -> None:
    """Wait until both guests run; then kill a host agent, or the actor that started it."""
    wait_until(lambda: len(lab.agents("guest_agent")) == 2, "two guests")
    host_agent = min(lab.agents("host_agent"))
    os.kill(host_agent if what == "host agent" else parent_pid(host_agent), signal.SIGKILL)


def check_figures(data: dict[str, Any]) -> None:
    assert data["state"] == "done"
    for arm in data["arms"]:
        assert arm["trials"] == 2
        assert arm["undecided"] == ""
        assert arm["footprint"]["provisioned_bytes"] == 2 * 64 << 20
        assert arm["footprint"]["verified_pages"] == 2 * 2 * 40 * 256, (
            "samples of two attempts are mixed"
        )
        assert arm["footprint"]["wrong_pages"] == 0
    assert data["arms"][1]["saved_bytes"]["pairs"] == 2
    counted = [(trial["arm"], trial["repetition"]) for trial in data["trials"] if trial["counted"]]
    assert len(counted) == len(set(counted)) == 4


def test_lost_hosts_are_tried_again_and_then_the_run_can_go_on(lab: Lab) -> None:
    with lab.started("run", lab.spec(SPEC), "--retries", "1", "-o", "json") as process:
        wait_for_line(process, "trial 1 ")
        kill_one(lab, "actor")
        assert "host" in (said := wait_for_line(process, "lost: "))
        assert "its actor died" in said
        wait_for_line(process, "trial 2 ")
        kill_one(lab, "host agent")
        assert "its host agent was lost" in wait_for_line(process, "lost: ")
        wait_for_line(process, "trial 1 of 4: ")  # the trial is run again, at the end of the run
        kill_one(lab, "host agent")
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 3, err
    assert "attempt 2" in err
    assert "undecided: " in err
    assert "to resume: hintfleet run --resume" in err
    data = json.loads(out)
    assert data["state"] == "undecided"
    states = [(t["position"], t["attempt"], t["lost"], t["counted"]) for t in data["trials"]]
    assert states == [
        (0, 1, True, False),
        (1, 1, True, False),
        (2, 1, False, True),
        (3, 1, False, True),
        (0, 2, True, True),
        (1, 2, False, True),
    ]
    assert data["reason"] == data["trials"][4]["undecided"]
    lab.check_nothing_is_left()

    again = lab.run("run", "--resume", "latest", "-o", "json")
    check_figures(data := result(again))
    assert "3 of 4 trials have their results and are kept" in again.stderr
    assert "trial 1 of 4" in again.stderr
    assert "trial 2 of 4" not in again.stderr
    lab.check_nothing_is_left()

    once_more = lab.run("run", "--resume", data["run_id"][-6:], "-o", "json")
    assert result(once_more) == data
    assert "no trial left to run" in once_more.stderr
    shown = lab.run("show").stdout
    assert "its actor died" in shown
    assert "run again" in shown


def acknowledged(lab: Lab) -> set[Part]:
    """Return the parts of samples that the store's database lists, read without our code."""
    with sqlite3.connect(
        f"file:{lab.folder}/hintfleet/hintfleet.sqlite?mode=ro", uri=True
    ) as store:
        return set(store.execute("SELECT trial_id, number, row_count FROM parts"))


def check_readable(lab: Lab, parts: set[Part]) -> None:
    for trial_id, number, row_count in parts:
        (path,) = lab.folder.glob(f"hintfleet/samples/*/{trial_id}/{number:06}.parquet")
        with duckdb.connect() as connection:
            assert connection.read_parquet(str(path)).shape[0] == row_count > 0


def killed_somewhere(
    lab: Lab, chance: random.Random, process: "subprocess.Popen[str]"
) -> set[Part]:
    """Kill the orchestrator some time after a trial began; return the parts that the database
    listed just before."""
    wait_for_line(process, "trial ")
    wait_until(lambda: bool(lab.agents("guest_agent")), "a guest")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0.0, 2.5))
    before = acknowledged(lab)
    for pid in lab.find("log_monitor.py"):
        os.kill(pid, signal.SIGSTOP)  # so that this helper of Ray outlives the orchestrator
    process.kill()
    process.wait()
    wait_until(lambda: not lab.agents("host_agent", "guest_agent"), "the end of all agents")
    return before


def test_nothing_acknowledged_is_lost_with_the_orchestrator(cleaning_lab: Lab) -> None:
    lab = cleaning_lab
    chance = random.Random(SEED)
    seen: set[Part] = set()
    command = ["run", lab.spec(SPEC)]
    for _ in range(KILLS):
        with lab.started(*command) as process:
            seen |= killed_somewhere(lab, chance, process)
        check_readable(lab, seen)
        (run,) = json.loads(lab.run("runs", "-o", "json").stdout)
        assert (run["state"], run["reason"]) == (
            "interrupted",
            "its process was killed or the machine went down",
        )
        command = ["run", "--resume", "latest", "-o", "json"]
    cleaned = json.loads(lab.run("doctor", "--clean", "-o", "json").stdout)["leaks"]
    assert "Ray process" in {leak["what"] for leak in cleaned}
    assert f"{lab.folder}/hintfleet/samples/{run['run_id']}/reserve" in {
        leak["where"] for leak in cleaned
    }
    lab.check_nothing_is_left()
    check_readable(lab, seen)
    shown = lab.run("show")
    assert shown.returncode == 130
    assert f"hintfleet run --resume {run['run_id'][-6:]}" in shown.stderr

    with lab.started(*command) as process:
        wait_for_line(process, "trial ")
        other = lab.run(*command)
        assert other.returncode == 1
        assert "is being run by another process" in other.stderr
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    check_figures(data := json.loads(out))
    assert sum(trial["sample_count"] > 0 for trial in data["trials"]) >= 4
    assert seen <= acknowledged(lab)
    check_readable(lab, acknowledged(lab))
    lab.check_nothing_is_left()


def test_a_replay_goes_on_without_the_file_that_was_recorded(lab: Lab) -> None:
    recorded = lab.folder / "day.csv"
    recorded.write_text("time_s,used_bytes\n0,10000000\n60,40000000\n120,8000000\n")
    phases = "    - {replay: day.csv, speed: 60, for: 500ms}\narms:\n"
    before, _, after = SPEC.partition("    - {allocate")
    path = lab.spec(before + phases + after.partition("arms:\n")[2])
    with lab.started("run", path) as process:
        wait_for_line(process, "trial 2 ")
        process.send_signal(signal.SIGINT)
        assert process.wait(RUN_TIMEOUT_S) == 130
    recorded.unlink()
    data = result(lab.run("run", "--resume", "latest", "-o", "json"))
    assert [arm["footprint"]["wrong_pages"] for arm in data["arms"]] == [0, 0]
    assert {arm["footprint"]["peak_resident_bytes"] for arm in data["arms"]} == {2 * 40 << 20}, (
        "both guests held what was recorded, in whole extents"
    )
    assert data["arms"][1]["saved_bytes"]["pairs"] == 2
    assert len(data["overrides"]["recordings"]["day.csv"]) == 64
    (run,) = json.loads(lab.run("runs", "-o", "json").stdout)
    assert run["overrides"] == data["overrides"], "without the points, too"
    lab.check_nothing_is_left()

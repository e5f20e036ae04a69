"""Runs whose guests are not alike, do not begin together, or come in several numbers; and keys of a
spec that the command line sets."""

import json
from typing import Any

from orchestrator.results.store.reader import Store
from orchestrator.trial.records import PhaseStarted
from tests.support.lab import Lab, result

CLASSES = """\
name: unlike
driver: embedded
hosts: {count: 1, memory: 1GiB}
guests:
  - {count: 1, memory: 128MiB, workload: {phases: [{allocate: 64MiB}]}}
  - {count: 2, memory: 64MiB, begin_within: 500ms}
workload:
  phases:
    - {allocate: 16MiB, for: 200ms}
    - {free: 100%, for: 200ms}
    - {repeat: 2}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap}
repetitions: 2
sample_period: 50ms
"""
# With three guests, as the test sets it, each host needs more than its budget, whatever the arm:
# the guests free nothing.
VARIED = """\
name: varied
driver: embedded
hosts: {count: 2, memory: 300MiB}
guests: {per_host: 2, memory: 128MiB, begin_within: 300ms}
vary: {per_host: [1, 2]}
workload:
  phases:
    - {allocate: 80%, for: 1s}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap}
sample_period: 50ms
"""


def test_each_class_has_its_size_and_its_workload(lab: Lab) -> None:
    data = result(lab.run("run", lab.spec(CLASSES), "-o", "json"))
    assert [arm["arm"] for arm in data["arms"]] == ["none", "bitmap"]
    for arm in data["arms"]:
        footprint = arm["footprint"]
        assert footprint["provisioned_bytes"] == (128 + 2 * 64) << 20
        # In each of two trials: each of the two guests of the second class frees 16 MiB twice, and
        # the guest of the first class keeps 64 MiB. All of that is read back.
        assert footprint["returned"]["freed_bytes"] == 2 * 2 * 2 * 16 << 20
        assert footprint["verified_pages"] == 2 * (2 * 2 * 16 + 64) << 8
        assert 0 < footprint["coincidence"] <= 1
    rows: list[dict[str, Any]] = json.loads(
        lab.run("savings", "--by", "guest", "-o", "json").stdout
    )
    sizes = {row["key"]: row["footprint"]["provisioned_bytes"] >> 20 for row in rows}
    assert sizes == {"host1-guest1": 128, "host1-guest2": 64, "host1-guest3": 64}
    with Store(lab.folder / "hintfleet") as store:
        phases = store.events(data["run_id"], PhaseStarted)
    assert {phase.guest for phase in phases if phase.title != "verify"} == {"host1-guest1"}
    report = lab.folder / "report.html"
    assert lab.run("report", "-o", str(report)).returncode == 0
    assert report.stat().st_size
    lab.check_nothing_is_left()


def test_every_arm_runs_with_every_number_of_guests(lab: Lab) -> None:
    settings = ("--set", "vary.per_host=[1, 3]", "--set", "guests.begin_within=200ms")
    data = result(lab.run("run", lab.spec(VARIED), *settings, "-o", "json"))
    found = {(point["arm"], point["guests"]): point for point in data["frontier"]}
    assert {key: (point["hosts"], point["ran_out"]) for key, point in found.items()} == {
        ("none", 1): (2, 0),
        ("none", 3): (2, 2),
        ("bitmap", 1): (2, 0),
        ("bitmap", 3): (2, 2),
    }
    assert data["state"] == "done"
    shown = lab.run("show")
    assert "2 of 2" in shown.stdout
    assert "none runs 1 guest on a host" in shown.stdout
    spec = lab.run("show", "--spec").stdout
    assert spec.startswith(
        "# run with --set 'vary.per_host=[1, 3]' --set guests.begin_within=200ms\n"
    )
    lab.check_nothing_is_left()

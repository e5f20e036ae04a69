"""Runs on a Ray cluster of several nodes: hosts are spread over them, stay on those that have what
they need, and run again elsewhere if a node dies."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agents import running_host_agent, wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, result, wait_for_line
from tests.support.ray_cluster import TINY, RayCluster, python_without, ray_cluster

SPEC = TINY + "timeouts: {nodes: 3s}\n"
SHORT = SPEC.replace("6s", "500ms").replace("repetitions: 2", "repetitions: 1")


@pytest.fixture
def cluster(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """Run a cluster of two nodes; the lab's commands use it."""
    with ray_cluster(lab, "head", "other") as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def where(data: dict[str, Any], trial: int = -1) -> dict[str, str]:
    """Return the name of the node that each host was on in an attempt at a trial."""
    places = data["trials"][trial]["places"]
    return {host: data["nodes"][node_id]["name"] for host, node_id in places.items()}


def test_a_node_dies_and_another_one_joins(lab: Lab, cluster: RayCluster) -> None:
    cluster.add("third")
    with lab.started("run", lab.spec(SPEC), "-o", "json") as process:
        wait_for_line(process, "trial 1 ")
        assert cluster.actors() == {"head": 1, "other": 1, "third": 1}
        wait_until(lambda: len(lab.agents("guest_agent")) == 3, "three guests")
        cluster.kill("third")
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    (lost,) = (line for line in err.splitlines() if line.startswith("lost: "))
    assert lost.startswith("lost: host3: its actor died: ")
    data = json.loads(out)
    assert [(t["position"], t["attempt"], t["lost"]) for t in data["trials"]] == [
        (0, 1, True),
        (1, 1, False),
        (0, 2, False),
    ]
    assert where(data, 0) == {"host1": "head", "host2": "other", "host3": "third"}
    assert where(data, 1) | {"host3": ""} == {"host1": "head", "host2": "other", "host3": ""}
    assert where(data, 1)["host3"] in ("head", "other")
    assert where(data, 2) == where(data, 1)
    assert {node["environment"]["ray"] for node in data["nodes"].values()} == {
        data["environment"]["ray"]
    }
    starts = ("lost: ", "trial ", "warning: ", "stored in ", "next: ", "      hintfleet report ")
    assert not [line for line in err.splitlines() if line and not line.startswith(starts)]
    (log,) = lab.folder.glob("hintfleet/logs/*.log")
    assert str(log) in err, "what Ray wrote is in this file"

    cluster.add("four")
    joined = result(lab.run("run", lab.spec(SHORT), "-o", "json"))
    assert sorted(where(joined).values()) == ["four", "head", "other"]
    shown = lab.run("show").stdout
    assert "four" in shown
    assert f"ray {data['environment']['ray']}" in shown


def test_what_a_cluster_could_run(lab: Lab, cluster: RayCluster, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_TOKEN", "0" * 32)
        stranger = lab.run("cluster", "--address", cluster.head_address)
    assert stranger.returncode == 1
    assert "requires its token\n  try: set RAY_AUTH_MODE=token" in stranger.stderr

    data = result(lab.run("cluster", "--address", cluster.head_address, "-o", "json"))
    assert [node["name"] for node in data["nodes"]] == ["head", "other"]
    assert all(node["available_bytes"] > 0 < node["processors"] for node in data["nodes"])
    assert all(node["libvirt"] and not node["problem"] for node in data["nodes"])

    cluster.add("bare", python=python_without(tmp_path / "a", "hintfleet", "_hintfleet"))
    cluster.add("poor", python=python_without(tmp_path / "b", "pydantic", "grpcio_health"))
    data = result(lab.run("cluster", "-o", "json"), code=1)
    assert {node["name"]: node["problem"] for node in data["nodes"]} == {
        "bare": "has no hintfleet",
        "poor": "lacks grpcio-health-checking, pydantic",
        "head": "",
        "other": "",
    }
    done = lab.run("run", lab.spec(SPEC))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"bare \(.+\): has no hintfleet\n", done.stderr)
    assert re.search(r"poor \(.+\): lacks grpcio-health-checking, pydantic\n", done.stderr)
    assert "hintfleet[embedded,orchestrator]==" in done.stderr
    assert not lab.agents("host_agent")


def test_a_node_with_another_version_is_named(
    lab: Lab, cluster: RayCluster, tmp_path: Path
) -> None:
    info = tmp_path / "newer/hintfleet-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hintfleet\nVersion: 9.9\n")
    cluster.add("newer", environment={"PYTHONPATH": str(info.parent)})
    done = lab.run("run", lab.spec(SPEC))
    assert done.returncode == 1
    assert re.search(r"newer \(.+\): has hintfleet 9\.9, here it is 0\.", done.stderr)


def test_a_unix_socket_is_on_the_node_that_was_named(lab: Lab, cluster: RayCluster) -> None:
    spec = lab.spec(SHORT)
    with running_host_agent() as one, running_host_agent() as other:
        unsaid = lab.run("run", spec, "--host", one.control)
        assert unsaid.returncode == 2
        assert f"host1: {one.control} is an address on one machine" in unsaid.stderr
        assert f"--host {one.control},node=NAME; nodes: head, other" in unsaid.stderr

        nowhere = lab.run("run", spec, "--host", f"{one.control},node=six")
        assert nowhere.returncode == 1
        assert "waiting up to 3 s for more nodes" in nowhere.stderr
        missing = "1 of 1 hosts have no node (1 x host agent on node six), after "
        assert missing in nowhere.stderr

        deaf = lab.run("run", spec, "--host", "unix:/nobody/there,node=other")
        assert deaf.returncode == 1
        assert re.search(r"error: on node other \(.+\): unix:/nobody/there: GetHost: ", deaf.stderr)

        hosts = (f"{one.control},node=other", f"{other.control},node=head")
        options = [word for host in hosts for word in ("--host", host)]
        data = result(lab.run("run", spec, *options, "-o", "json"))
    assert where(data) == {"host1": "other", "host2": "head"}
    assert lab.run("show", "--spec").stdout.startswith(f"# run with {' '.join(options)}\n")


def test_hosts_that_no_node_has_memory_for(lab: Lab, cluster: RayCluster) -> None:
    large = SPEC.replace("memory: 256MiB", "memory: 4TiB").replace("per_host: 1", "per_host: 1000")
    large = large.replace("memory: 64MiB", "memory: 4GiB").replace("40MiB", "3GiB")
    done = lab.run("run", lab.spec(large))
    assert done.returncode == 1
    assert "3 of 3 hosts have no node (3 x embedded host of up to 2.98 TiB), after " in done.stderr
    assert re.search(r"other \(.+\): room for 0, .+ GiB available", done.stderr)
    assert not (lab.folder / "hintfleet/samples").exists()

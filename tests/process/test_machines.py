"""Three machines, as network namespaces, are the nodes of a Ray cluster: logical hosts on all of
them; a host agent on each, reached by address over TLS; one machine is lost, and another joins."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hintfleet.net.tls import Role
from orchestrator.pki import Authority
from tests.support.agents import running_host_agent, wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, result, wait_for_line
from tests.support.namespaces import NEEDS, Machine, are_possible, machines
from tests.support.ray_cluster import RayCluster, ray_cluster

pytestmark = pytest.mark.skipif(not are_possible(), reason=NEEDS)

SPEC = """\
name: tiny
driver: embedded
hosts: {count: 3, memory: 256MiB}
guests: {per_host: 1, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB, for: 8s}
    - {free: 75%, for: 500ms, settle: true}
arms:
  - {name: bitmap, method: hinting}
repetitions: 1
"""
SHORT = SPEC.replace("8s", "500ms")


@pytest.fixture(scope="module")
def network() -> Iterator[list[Machine]]:
    with machines("one", "two", "three", "four") as made:
        yield made


@pytest.fixture
def cluster(
    lab: Lab, network: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[RayCluster]:
    """Run a cluster on the machines one, two and three; commands that use it run on machine one."""
    here = replace(lab, prefix=network[0].prefix)
    with ray_cluster(here, head_address=f"{network[0].address}:6379") as made:
        for machine in network[:3]:
            add(made, machine)
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def add(cluster: RayCluster, machine: Machine) -> None:
    own_address = f"--node-ip-address={machine.address}"
    cluster.add(machine.name, own_address, prefix=machine.prefix)


def addresses(data: dict[str, Any], trial: int = -1) -> dict[str, str]:
    """Return the address of the node that each host was on in an attempt at a trial."""
    places = data["trials"][trial]["places"]
    return {host: data["nodes"][node_id]["address"] for host, node_id in places.items()}


def test_a_machine_is_lost_and_another_one_joins(
    network: list[Machine], cluster: RayCluster
) -> None:
    lab = cluster.lab
    data = result(lab.run("cluster", "--address", "auto", "-o", "json"))
    first = [machine.address for machine in network[:3]]
    assert sorted(node["address"] for node in data["nodes"]) == first
    with lab.started("run", lab.spec(SPEC), "-o", "json") as process:
        wait_for_line(process, "trial 1 ")
        wait_until(lambda: len(lab.agents("guest_agent")) == 3, "three guests")
        for pid in network[2].processes():
            os.kill(pid, signal.SIGKILL)
        del cluster.raylets["three"]
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    data = json.loads(out)
    assert process.returncode == 0, err
    assert [(trial["lost"], trial["undecided"] == "") for trial in data["trials"]] == [
        (True, False),
        (False, True),
    ]
    before, after = addresses(data, 0), addresses(data, 1)
    assert sorted(before.values()) == first
    moved = {host for host in before if before[host] != after[host]}
    assert {before[host] for host in moved} == {network[2].address}
    assert {after[host] for host in moved} < {network[0].address, network[1].address}

    add(cluster, network[3])
    data = result(lab.run("run", lab.spec(SHORT), "-o", "json"))
    assert sorted(addresses(data).values()) == [
        machine.address for machine in (network[0], network[1], network[3])
    ]


def test_host_agents_of_three_machines_over_tls(
    network: list[Machine], cluster: RayCluster, tmp_path: Path
) -> None:
    lab = cluster.lab
    authority = Authority.init(tmp_path / "pki", "test", 2)
    operator = authority.issue(Role.OPERATOR, "alice", [], 1)
    agents = [f"{machine.address}:7070" for machine in network[:3]]
    with ExitStack() as stack:
        for machine, address in zip(network, agents, strict=False):
            folder = authority.issue(Role.HOST, machine.name, [machine.address], 1)
            options = ("--listen", address, "--tls", str(folder), "--name", machine.name)
            stack.enter_context(running_host_agent(*options, prefix=machine.prefix))
        hosts = [word for address in agents for word in ("--host", address)]
        plain = lab.run("run", lab.spec(SHORT), *hosts)
        assert plain.returncode == 2
        assert "plain text is allowed only there" in plain.stderr
        data = result(lab.run("run", lab.spec(SHORT), *hosts, "--tls", str(operator), "-o", "json"))
        assert data["trials"][0]["undecided"] == ""
        assert data["arms"][0]["footprint"]["verified_pages"] == 3 * 40 * 256
        assert data["arms"][0]["footprint"]["wrong_pages"] == 0

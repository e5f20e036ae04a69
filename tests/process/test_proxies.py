"""hintfleet and Ray ignore proxies in the environment, which many companies' machines have. The
proxies of these tests are a port where nobody listens: a connection through them would fail."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from orchestrator.spec.model import Timeouts
from orchestrator.trial.host_client import HostClient
from tests.support.agents import running_host_agent
from tests.support.lab import Lab, made_lab, result
from tests.support.ray_cluster import ray_cluster

SPEC = """\
name: tiny
driver: embedded
hosts: {count: 1, memory: 256MiB}
guests: {per_host: 1, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB}
    - {free: 75%, settle: true}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting}
repetitions: 2
timeouts: {create: 20s}
"""
PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set proxies in the environment of this process, which all child processes inherit."""
    with socket.socket() as bound:  # it never listens, so connections are refused
        bound.bind(("127.0.0.1", 0))
        for name in PROXIES:
            for spelling in (name, name.upper()):
                monkeypatch.setenv(spelling, f"http://127.0.0.1:{bound.getsockname()[1]}")
        # Turns proxies on in Ray. Must have no effect on a private cluster on loopback.
        monkeypatch.setenv("RAY_grpc_enable_http_proxy", "1")
        yield


def test_a_run_on_this_machine(lab: Lab) -> None:
    data = result(lab.run("run", lab.spec(SPEC), "-o", "json"))
    assert data["state"] == "done"
    lab.check_nothing_is_left()


def test_a_run_on_a_ray_cluster(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_grpc_enable_http_proxy")
    with ray_cluster(lab, "head") as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        assert result(lab.run("run", lab.spec(SPEC), "-o", "json"))["state"] == "done"


@pytest.mark.parametrize("how", ["unix-abstract", "TCP"])
def test_guests_reach_their_host_agent(how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    tcp = ("--guest-listen", address, "--guest-advertise", address)
    with running_host_agent(*(tcp if how == "TCP" else ())) as host:
        host.watch()
        host.create()
        host.allocate(16 * MIB)
        host.free(16 * MIB)
        assert host.settle().ledger.reclaimed_now_bytes > 0


def test_the_orchestrator_reaches_a_host_agent() -> None:
    async def name_of(address: str) -> str:
        async with aclosing(HostClient(address, Timeouts())) as client:
            return (await client.get_host(host_pb2.EMBEDDED, wait=False)).name

    with running_host_agent("--listen", "127.0.0.1:0", "--name", "near") as host:
        assert asyncio.run(name_of(host.control)) == "near"


def test_queries_reach_the_fleet_service(lab: Lab) -> None:
    with lab.started("serve", "--listen", "127.0.0.1:0") as server:
        assert server.stderr is not None
        address = server.stderr.readline().split()[-1]
        there = lab.run("savings", "--server", address)
        here = lab.run("savings")
        assert (there.returncode, there.stderr) == (here.returncode, here.stderr)

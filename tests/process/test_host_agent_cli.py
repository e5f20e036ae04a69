"""The host agent as an operator uses it: flags, errors, health, reflection, metrics, `--doctor` and
the lifeline."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.lab import on_this_machine


def host_agent_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "host_agent", *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_health_says_serving(host_agent: HostAgent) -> None:
    with grpc.insecure_channel(host_agent.control) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "hintfleet.v1.HostService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=HANG_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


def test_a_client_without_our_stubs_finds_the_service(host_agent: HostAgent) -> None:
    with grpc.insecure_channel(host_agent.control) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "hintfleet.v1.HostService" in database.get_services()
        described = database.FindFileContainingSymbol("hintfleet.v1.HostService")
        assert "Settle" in [method.name for method in described.service[0].method]


def test_metrics_are_the_books() -> None:
    port = free_port()
    with running_host_agent("--metrics", f"127.0.0.1:{port}") as host:
        host.watch()
        host.create()
        host.allocate(96 * MIB)
        host.free(64 * MIB)
        books = host.settle().ledger
        # The first telemetry comes with the session, before anything is allocated.
        wait_until(
            lambda: host.guests()["g"].resident_parts.used_bytes >= 32 * MIB, "telemetry of now"
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as page:
            lines = page.read().decode().splitlines()
    series = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "{" in line}
    assert series["hintfleet_guest_resident_bytes"] == books.resident_bytes == 32 * MIB
    assert series["hintfleet_guest_reclaimed_bytes_total"] == books.reclaimed_total_bytes
    prefix = "hintfleet_guest_resident_part_bytes{"
    parts = {
        line.split('part="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith(prefix)
    }
    assert {"used", "held_back", "waiting", "unexplained"} < set(parts)
    assert sum(parts.values()) >= 32 * MIB, "they are of the last telemetry"
    assert series["hintfleet_guest_process_rss_bytes"] > MIB
    (one,) = (line for line in lines if line.startswith("hintfleet_guest_provisioned_bytes{"))
    for label in ('guest="g"', 'trial="test-trial"', 'host="', 'domain=""', 'uuid="'):
        assert label in one


def test_guests_are_in_the_cgroup_of_the_budget_which_goes_with_the_host_agent() -> None:
    with running_host_agent("--memory-budget", "256MiB", "--enforce-budget", "embedded") as host:
        found = host.stub.GetHost(host_pb2.GetHostRequest(), timeout=HANG_S).budget
        if not found.cgroup:
            pytest.skip(f"no cgroup can be made here: {found.why_watched}")
        host.watch()
        host.create()
        cgroup = Path(found.cgroup)
        assert host.guests()["g"].pid in map(int, (cgroup / "cgroup.procs").read_text().split())
    assert not cgroup.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--listen", "0.0.0.0:7070"], 2, "hintfleet pki"),
        (["--guest-listen", "192.0.2.1:0"], 2, "hintfleet pki"),
        (["--guest-listen", "unix:/x"], 2, "'unix:/x' is not HOST:PORT"),
        (["--listen", "unix-abstract:x"], 2, "every user of this machine could connect"),
        (["--metrics", "0.0.0.0:0"], 2, "hintfleet pki"),
        (["--metrics", "unix:/x"], 2, "not HOST:PORT"),
        (["--tls", "/nowhere"], 2, "ca.pem: No such file"),
        (["--guest-tls", "/nowhere"], 2, "ca.pem: No such file"),
        (["--memory-budget", "4G"], 2, "ambiguous"),
        (["--orphan-after", "0"], 2, "'0' is no number of seconds from 1 to 1048575"),
        (["--watch-grace", "-1"], 2, "'-1' is no number of seconds"),
        (["--enforce-budget", "embedded", "--state", "/x"], 2, "does not work with --state"),
        (["--metrics", "nonsense"], 2, "not HOST:PORT"),
        (["--nonsense"], 2, "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_answered_with_what_to_do(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    listen = [] if "--listen" in arguments else ["--listen", f"unix:{tmp_path}/host.sock"]
    done = host_agent_command(*listen, *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_in_use_is_an_error(host_agent: HostAgent) -> None:
    port = host_agent.guest_address.rpartition(":")[2]
    done = host_agent_command("--listen", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_socket_that_is_in_use_is_left_to_its_owner(host_agent: HostAgent) -> None:
    done = host_agent_command("--listen", host_agent.control)
    assert done.returncode == 1
    assert f"another host agent listens on {host_agent.control}" in done.stderr
    assert "try:" in done.stderr
    assert host_agent.guests() == {}, "it can be reached as before"


def test_only_end_of_file_on_the_lifeline_ends_the_agent(host_agent: HostAgent) -> None:
    os.write(host_agent.lifeline_fd, b"still here")
    assert host_agent.guests() == {}
    assert host_agent.process.poll() is None


def test_doctor_really_tried() -> None:
    done = host_agent_command("--doctor", "--libvirt-uri", "test:///default")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["hole punch on a memfd"]["ok"], findings
    assert "punched and gone" in findings["hole punch on a memfd"]["detail"]
    assert {name: finding["needed_for"] for name, finding in findings.items()} == {
        "hole punch on a memfd": "embedded",
        "guest image": "libvirt",
        "libvirt": "libvirt",
    }


def test_the_lifeline_ends_it(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    with on_this_machine():
        host_agent.cut_lifeline()
        assert host_agent.process.wait(HANG_S) == 0

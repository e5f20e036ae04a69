"""TLS: which certificates, roles and tokens the servers accept and refuse, and which servers'
certificates clients refuse."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hintfleet.agent_config import AgentConfig
from hintfleet.net.tls import Role, Tls
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from hintfleet.v1.host_pb2_grpc import HostServiceStub
from orchestrator.cli import run_command
from orchestrator.pki import Authority
from tests.support.agents import (
    HANG_S,
    HostAgent,
    InProcessHost,
    host_in_process,
    running_host_agent,
)

UUID, OTHER_UUID = "6f3c2b0e-5d0a-4c7e-9b52-0c4f4a1f2d10", "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Folders:
    """The TLS folders that one authority has issued."""

    authority: Authority
    host: Path
    operator: Path
    guest: Path

    def tls(self, role: Role) -> Tls:
        return Tls.read(getattr(self, role.value), server=role is Role.HOST)


def folders_of(place: Path) -> Folders:
    authority = Authority.init(place / "pki", "test", 2)
    return Folders(
        authority,
        host=authority.issue(Role.HOST, "h1", ["127.0.0.1"], 1),
        operator=authority.issue(Role.OPERATOR, "alice", [], 1),
        # With this address, only its role keeps it from being a server's certificate.
        guest=authority.issue(Role.GUEST, UUID, ["127.0.0.1"], 1),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return folders_of(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def metrics_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def host_agent(folders: Folders, metrics_port: int) -> Iterator[HostAgent]:
    """Run a host agent with TLS at all addresses. The `stub` of the result uses plain text, so it
    cannot be used."""
    with running_host_agent(
        *("--listen", "127.0.0.1:0", "--metrics", f"127.0.0.1:{metrics_port}"),
        *("--tls", str(folders.host), "--guest-tls", str(folders.host)),
    ) as agent:
        yield agent


def get_host(address: str, tls: Tls) -> host_pb2.Host:
    with grpc.secure_channel(address, tls.for_client()) as channel:
        return HostServiceStub(channel).GetHost(
            host_pb2.GetHostRequest(drivers=[host_pb2.EMBEDDED]), timeout=HANG_S
        )


def hello(address: str, tls: Tls, uuid: str, token: str) -> pb.HostMessage:
    message = pb.GuestMessage(
        hello=pb.Hello(
            identity=pb.Identity(guest_uuid=uuid, token=token), page_size_bytes=4096, boot_id="b"
        )
    )
    with grpc.secure_channel(address, tls.for_client()) as channel:
        call = HintingServiceStub(channel).Session(iter([message]), timeout=HANG_S)
        return next(iter(call))


def refusal(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), str(error.value.details())


def test_an_operator_may_control(host_agent: HostAgent, folders: Folders) -> None:
    host = get_host(host_agent.control, folders.tls(Role.OPERATOR))
    assert [state.usable for state in host.drivers] == [True]


def test_a_guest_may_not_control(host_agent: HostAgent, folders: Folders) -> None:
    with pytest.raises(grpc.RpcError) as error:
        get_host(host_agent.control, folders.tls(Role.GUEST))
    assert refusal(error) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this service is for operators, but the certificate is for a guest",
    )


def test_a_guest_may_not_watch_or_ask_for_health(host_agent: HostAgent, folders: Folders) -> None:
    credentials = folders.tls(Role.GUEST).for_client()
    with grpc.secure_channel(host_agent.control, credentials) as channel:
        watch = HostServiceStub(channel).Watch(
            host_pb2.WatchRequest(trial_id="t", period_ms=50), timeout=HANG_S
        )
        with pytest.raises(grpc.RpcError) as error:
            next(iter(watch))
        assert refusal(error)[0] is grpc.StatusCode.FAILED_PRECONDITION
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(), timeout=HANG_S)
        assert refusal(error)[0] is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError) as error:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=HANG_S))
        assert refusal(error)[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_an_operator_sees_health_and_samples(host_agent: HostAgent, folders: Folders) -> None:
    """The check of the role lets an operator's streams pass, of both kinds of handlers: a coroutine
    (health) and an async generator (samples)."""
    credentials = folders.tls(Role.OPERATOR).for_client()
    with grpc.secure_channel(host_agent.control, credentials) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=HANG_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        samples = HostServiceStub(channel).Watch(
            host_pb2.WatchRequest(trial_id="t", period_ms=50), timeout=HANG_S
        )
        assert next(iter(samples)).at_unix_us
        samples.cancel()


def test_an_operator_is_no_guest(host_agent: HostAgent, folders: Folders) -> None:
    with pytest.raises(grpc.RpcError) as error:
        hello(host_agent.guest_address, folders.tls(Role.OPERATOR), UUID, "")
    assert "this service is for guests" in refusal(error)[1]


def test_clients_without_a_valid_certificate_get_no_answer(
    host_agent: HostAgent, folders: Folders, tmp_path: Path
) -> None:
    """Clients without a certificate, with one from another authority, or in plain text."""
    ours = folders.tls(Role.OPERATOR)
    theirs = folders_of(tmp_path).tls(Role.OPERATOR)
    for credentials in (
        grpc.ssl_channel_credentials(ours.ca),
        grpc.ssl_channel_credentials(ours.ca, theirs.key, theirs.cert),
    ):
        for address in (host_agent.control, host_agent.guest_address):
            with grpc.secure_channel(address, credentials) as channel:
                with pytest.raises(grpc.RpcError) as error:
                    HostServiceStub(channel).ListGuests(
                        host_pb2.ListGuestsRequest(), timeout=HANG_S
                    )
                assert refusal(error)[0] is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(host_agent.control) as channel:
        with pytest.raises(grpc.RpcError) as error:
            HostServiceStub(channel).ListGuests(host_pb2.ListGuestsRequest(), timeout=HANG_S)
        assert refusal(error)[0] is grpc.StatusCode.UNAVAILABLE


def test_a_guest_cannot_play_the_host(folders: Folders) -> None:
    """A guest's certificate is from the same authority, but not valid for a server."""
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", folders.tls(Role.GUEST).for_server())
    server.start()
    with pytest.raises(grpc.RpcError) as error:
        get_host(f"127.0.0.1:{port}", folders.tls(Role.OPERATOR))
    assert refusal(error)[0] is grpc.StatusCode.UNAVAILABLE
    server.stop(0)


def scrape(port: int, folder: Path | None, ca: Path) -> str:
    context = ssl.create_default_context(cafile=str(ca))
    if folder is not None:
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    address = f"https://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(address, timeout=HANG_S, context=context) as page:
        return str(page.read().decode())


def test_metrics_are_for_operators(
    host_agent: HostAgent, folders: Folders, metrics_port: int
) -> None:
    ca = folders.operator / "ca.pem"
    # A client that connects and sends nothing does not block other clients.
    with socket.create_connection(("127.0.0.1", metrics_port)):
        assert "hintfleet_guest_resident_bytes" in scrape(metrics_port, folders.operator, ca)
    with pytest.raises(urllib.error.HTTPError) as error:
        scrape(metrics_port, folders.guest, ca)
    assert error.value.code == 403
    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|EOF|pipe"):
        scrape(metrics_port, None, ca)


# The service for guests: certificates and tokens


@pytest.fixture(scope="module")
def door(folders: Folders) -> Iterator[InProcessHost]:
    with host_in_process(guest_tls=folders.tls(Role.HOST)) as host:
        host.watch()
        host.create("mine", method=host_pb2.NONE, uuid=UUID)
        host.create("other", method=host_pb2.NONE, uuid=OTHER_UUID)
        yield host


def test_a_guest_shows_its_certificate_and_its_token(door: InProcessHost, folders: Folders) -> None:
    tls = folders.tls(Role.GUEST)
    assert hello(door.guest_address, tls, UUID, door.token("mine")).HasField("welcome")
    for uuid, token, said in (
        (UUID, "0" * 32, "with that token"),
        (OTHER_UUID, door.token("other"), "certificate is not for guest"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            hello(door.guest_address, tls, uuid, token)
        assert said in refusal(error)[1]


def test_a_uuid_is_one_guests(door: InProcessHost) -> None:
    for uuid, said in ((UUID, "already"), ("x", "not a UUID")):
        with pytest.raises(grpc.RpcError) as error:
            door.create("third", uuid=uuid)
        assert said in refusal(error)[1]
    assert set(door.guests()) == {"mine", "other"}


def guest_agent_process(config: AgentConfig) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "guest_agent", "--workload-only", "--config", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(config.to_json() + "\n")
    process.stdin.flush()
    return process


def test_a_guest_agent_speaks_tls(door: InProcessHost, folders: Folders) -> None:
    """A guest agent that connects over TLS, as in a real guest, runs the workload's step instead of
    the embedded guest's process, which is suspended."""
    os.kill(door.guests()["mine"].pid, signal.SIGSTOP)
    config = AgentConfig(
        server=door.guest_address,
        guest_uuid=UUID,
        token=door.token("mine"),
        tls_folder=str(folders.guest),
    )
    process = guest_agent_process(config)
    try:
        # The host agent sends the command to the suspended workload, and sends it again to the
        # other workload when that has attached.
        assert door.allocate(4 * MIB, "mine").held_bytes == 4 * MIB
        status = Path(f"/proc/{process.pid}/status").read_text()
        rss_kib = int(re.findall(r"RssAnon:\s+(\d+)", status)[0])
        assert rss_kib > 4 << 10, "another process did the step"
        assert "THP_enabled:\t1\n" in status, "a workload may use huge pages, unlike an agent"
    finally:
        process.kill()
        process.communicate()
        os.kill(door.guests()["mine"].pid, signal.SIGCONT)


def test_a_guest_agent_with_anothers_certificate_gives_up(
    door: InProcessHost, folders: Folders
) -> None:
    config = AgentConfig(
        server=door.guest_address,
        guest_uuid=OTHER_UUID,
        token=door.token("other"),
        tls_folder=str(folders.guest),
    )
    process = guest_agent_process(config)
    assert process.wait(HANG_S) == 1
    _, said = process.communicate()
    assert f"the certificate is not for guest {OTHER_UUID}" in said


# Commands of the orchestrator


def test_an_experiment_on_a_host_behind_tls_needs_an_operators_folder(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "quickstart", "--host", "192.0.2.1:1", "--data-dir", str(tmp_path)]
    assert run_command(base) == 2
    assert "--tls FOLDER" in capsys.readouterr().err
    assert run_command([*base, "--tls", str(folders.host)]) == 2
    assert "purpose" in capsys.readouterr().err


@pytest.fixture
def fleet_service(folders: Folders, tmp_path: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "orchestrator", "serve", "--listen", "127.0.0.1:0"),
            *("--tls", str(folders.host), "--data-dir", str(tmp_path)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    yield process.stderr.readline().split()[-1]
    process.terminate()
    process.communicate()
    assert process.returncode == 0


def test_savings_from_a_fleet_service_behind_tls(
    fleet_service: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["savings", "--server", fleet_service, "-o", "json"]
    assert run_command([*ask, "--tls", str(folders.operator)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run_command([*ask, "--tls", str(folders.guest)]) == 1
    assert "this service is for operators" in capsys.readouterr().err
    assert run_command(ask) == 1

"""What a host agent does about guests that lie, flood, stall or do not identify themselves: it
refuses, slows, bans or disconnects them, and serves another guest meanwhile. Answers that nobody
asked for and wrong tokens are not violations."""

import contextlib
import itertools
import os
import queue
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import grpc
import pytest

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2_grpc import HintingServiceStub
from host_agent import server
from host_agent.api import guest_service
from host_agent.session import rate_limits, stream
from host_agent.session.gate import LIMITS
from tests.support.agents import HANG_S, InProcessHost, host_in_process, wait_until
from tests.support.speaker import Speaker

Identity = tuple[str, str]


@pytest.fixture
def host_agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHost]:
    """Run a host agent in this process, with limits and times that keep the tests short. The rate
    limit of batches and the wait for a stream's first message are so large that no test reaches
    them."""
    monkeypatch.setattr(rate_limits, "FLOOD_S", 0.5)
    monkeypatch.setattr(rate_limits, "BATCHES", rate_limits.Rate(per_s=1e6, burst=1000))
    monkeypatch.setattr(rate_limits, "BANS_S", (3.0, 0.1, float("inf")))
    monkeypatch.setattr(guest_service, "_MAX_PENDING_STREAMS", 8)
    monkeypatch.setattr(guest_service, "_FIRST_MESSAGE_S", 3600.0)
    monkeypatch.setattr(guest_service, "_REFUSAL_S", 0.05)
    monkeypatch.setattr(stream, "_GRACE_S", 0.3)
    short = ("grpc.server_handshake_timeout_ms", 500)
    monkeypatch.setattr(server, "GUEST_OPTIONS", (short, *server.GUEST_OPTIONS))
    with host_in_process() as host:
        host.watch()
        yield host


@pytest.fixture
def identity(host_agent: InProcessHost) -> Identity:
    """Return UUID and token of a guest without hinting: a test can open the guest's session."""
    return host_agent.create(method=host_pb2.NONE).uuid, host_agent.token("g")


@pytest.fixture
def speaker(host_agent: InProcessHost) -> Iterator[Callable[[], Speaker]]:
    """Return a function that makes speakers; close all of them at the end."""
    with contextlib.ExitStack() as stack:

        def make() -> Speaker:
            made = Speaker(host_agent.guest_address)
            stack.callback(made.close)
            return made

        yield make


def assert_served(host: InProcessHost, name: str = "neighbour") -> None:
    """Check that the host agent serves another guest: memory that it frees is reclaimed."""
    if name not in host.guests():
        host.create(name)
    before = host.guests()[name].ledger.reclaimed_total_bytes
    host.allocate(8 * MIB, name)
    host.free(8 * MIB, name)
    host.settle(name)
    assert host.guests()[name].ledger.reclaimed_total_bytes >= before + 8 * MIB


def misbehave(speaker: Speaker, identity: Identity) -> tuple[grpc.StatusCode, str]:
    """Send an empty batch; return the status and the text that end or refuse the session."""
    speaker.hello(*identity)
    speaker.batch(1, 7, RangeSet())
    return speaker.refusal()


# Messages with impossible values


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        ({"page_size_bytes": 16384}, "pages have 16384 bytes"),
        ({"chunk_order": 11}, "chunk_order is 11"),
        ({"boot_id": "b" * 2000}, "length of boot_id is 2000"),
    ],
)
def test_an_impossible_hello_is_refused(
    speaker: Callable[[], Speaker], identity: Identity, hello: dict[str, Any], said: str
) -> None:
    one = speaker()
    one.hello(*identity, **hello)
    code, details = one.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in details


@pytest.mark.parametrize(
    "telemetry",
    [
        pb.Telemetry(free_bytes=128 * MIB + 1),
        pb.Telemetry(agent_cpu_us=1 << 60),
        pb.Telemetry(tracker_bytes=(1 << 64) - 1),
        pb.Telemetry(memory=pb.MemoryUse(total_bytes=(1 << 64) - 1)),
        pb.Telemetry(memory=pb.MemoryUse(used_bytes=1)),
        pb.Telemetry(memory=pb.MemoryUse(isolated_bytes=(1 << 64) - 1)),
    ],
    ids=str,
)
def test_impossible_telemetry_is_refused(
    host_agent: InProcessHost,
    speaker: Callable[[], Speaker],
    identity: Identity,
    telemetry: pb.Telemetry,
) -> None:
    one = speaker()
    one.hello(*identity)
    one.next()
    one.outbox.put(pb.GuestMessage(telemetry=telemetry))
    code, details = one.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    told = telemetry.memory if telemetry.HasField("memory") else telemetry
    [(field, value)] = told.ListFields()
    assert f"{field.name} is {value}" in details
    assert host_agent.registry.get("g").sessions.telemetry == pb.Telemetry()


class WorkloadSpeaker:
    """A fake workload of a guest: sends the answers that a test chooses."""

    def __init__(self, address: str, identity: Identity) -> None:
        self.channel = grpc.insecure_channel(address)
        self.outbox: queue.SimpleQueue[pb.WorkloadEvent | None] = queue.SimpleQueue()
        who = pb.Identity(guest_uuid=identity[0], token=identity[1])
        self.outbox.put(pb.WorkloadEvent(attach=pb.Attach(identity=who)))
        self.call = HintingServiceStub(self.channel).Workload(iter(self.outbox.get, None))

    def done(self, **fields: Any) -> None:
        self.outbox.put(pb.WorkloadEvent(done=pb.Done(**fields)))

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()
        self.channel.close()


@pytest.fixture
def workload(host_agent: InProcessHost, identity: Identity) -> Iterator[WorkloadSpeaker]:
    """Attach a fake workload in place of the guest's own one; the guest's process is suspended."""
    pid = host_agent.guests()["g"].pid
    os.kill(pid, signal.SIGSTOP)
    sessions = host_agent.registry.get("g").sessions
    own = sessions._workload
    made = WorkloadSpeaker(host_agent.guest_address, identity)
    wait_until(lambda: sessions._workload is not own, "the other workload")
    yield made
    made.close()
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "done",
    [
        {"held_bytes": 129 * MIB},
        {"changed_bytes": (1 << 64) - 1},
        {"verified_pages": 1 << 40},
        {"wrong_pages": 1 << 62},
        {"duration_us": 1 << 60},
        {"error": "e" * 2000},
    ],
)
def test_impossible_answers_of_a_workload_are_refused(
    workload: WorkloadSpeaker, done: dict[str, Any]
) -> None:
    workload.done(command_id=1, **done)
    with pytest.raises(grpc.RpcError) as caught:
        next(iter(workload.call))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(done)) in str(caught.value.details())


def test_answers_that_nobody_asked_for_are_dropped(
    host_agent: InProcessHost, workload: WorkloadSpeaker
) -> None:
    for number in (0, 1, 2, 1 << 40):
        workload.done(command_id=number, held_bytes=MIB)
    with ThreadPoolExecutor() as pool:
        step = pool.submit(host_agent.allocate, 2 * MIB)
        command = next(iter(workload.call))
        workload.done(command_id=command.command_id + 1, held_bytes=3 * MIB)
        workload.done(command_id=command.command_id, held_bytes=2 * MIB)
        assert step.result(HANG_S).held_bytes == 2 * MIB
    assert host_agent.registry.get("g").sessions.conduct.violations == 0


def test_control_characters_of_a_guest_reach_no_terminal(
    host_agent: InProcessHost, workload: WorkloadSpeaker
) -> None:
    with ThreadPoolExecutor() as pool:
        step = pool.submit(host_agent.allocate, MIB)
        workload.done(
            command_id=next(iter(workload.call)).command_id, error="\x1b[2Jno\nmemory\x07"
        )
        error = step.exception(HANG_S)
    assert isinstance(error, grpc.RpcError)
    assert error.details() == "guest g: �[2Jno\nmemory�"


# Too much: large messages, floods, acks that are not read, sessions


def test_a_message_that_is_too_large(
    host_agent: InProcessHost, speaker: Callable[[], Speaker], identity: Identity
) -> None:
    one = speaker()
    one.hello(*identity)
    one.next()
    one.outbox.put(pb.GuestMessage(batch=pb.Batch(ranges=bytes(300 << 10))))
    code, details = one.refusal()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert_served(host_agent)


def test_a_flood_is_slowed_and_then_ended_with_the_reason(
    host_agent: InProcessHost, speaker: Callable[[], Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limits, "MESSAGES", rate_limits.Rate(per_s=20, burst=40))
    uuid = host_agent.create("flooder", method=host_pb2.NONE).uuid
    one = speaker()
    one.hello(uuid, host_agent.token("flooder"))
    one.next()
    telemetry = pb.GuestMessage(telemetry=pb.Telemetry(free_bytes=MIB))
    for _ in range(1000):
        one.outbox.put(telemetry)
    assert one.refusal() == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "more than 20 messages per second for 0.5 s",
    )
    assert host_agent.registry.get("flooder").sessions.conduct.violations == 1
    assert_served(host_agent)


def fill_unread(host_agent: InProcessHost, one: Speaker) -> None:
    """Send batches and read no acks, until the host ends the session; fail if it never does."""
    epoch = one.next().welcome.epoch
    guest = host_agent.registry.get("g")
    before = host_agent.guests()["g"].ledger.batches
    # Ranges outside the guest's RAM are skipped, and an ack contains all skipped ranges: so the
    # acks are large.
    ranges = RangeSet(((1 << 30) + 1_000_001 * n, 1) for n in range(LIMITS.ranges_per_batch))
    for seq in range(1, 1000):
        if not guest.sessions._by_session:
            return
        one.batch(epoch, seq, ranges)
        wait_until(
            lambda: (
                not guest.sessions._by_session
                or host_agent.guests()["g"].ledger.batches == before + seq  # noqa: B023
            ),
            f"batch {seq} to be dealt with",
        )
    pytest.fail("acks queue up without limit")


def test_a_guest_that_never_reads_is_disconnected(
    host_agent: InProcessHost,
    speaker: Callable[[], Speaker],
    identity: Identity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unread acks fill the windows of the transport; then the host agent queues only a few."""
    monkeypatch.setattr(rate_limits, "STREAMS", 3)  # of the 3, one is the workload's stream
    unread = [speaker(), speaker()]
    for one in unread:
        one.hello(*identity)
        fill_unread(host_agent, one)
    another = speaker()
    another.hello(*identity)
    code, said = another.refusal()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert said == "3 streams are open, or were not read to their end"
    assert unread[0].refusal() == (
        grpc.StatusCode.UNAVAILABLE,
        "the guest does not read what it is sent",
    )
    another = speaker()
    another.hello(*identity)
    assert another.next().welcome.epoch, "one was read to its end"
    assert_served(host_agent)


def test_sessions_in_a_loop_are_limited_with_the_reason(
    speaker: Callable[[], Speaker], identity: Identity
) -> None:
    refusals = []
    for _ in range(3 * rate_limits.SESSIONS.burst):
        one = speaker()
        one.hello(*identity)
        try:
            one.next()
        except grpc.RpcError as error:
            refusals.append((error.code(), error.details()))
            break
        finally:
            one.close()
    assert refusals == [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "more than 5 streams opened per second")
    ]
    time.sleep(2 / rate_limits.SESSIONS.per_s)
    one = speaker()
    one.hello(*identity)
    assert one.next().welcome.epoch


# Guests that break rules again and again


def test_a_guest_that_keeps_breaking_rules_is_banned_then_dropped(
    host_agent: InProcessHost, speaker: Callable[[], Speaker], identity: Identity
) -> None:
    conduct = host_agent.registry.get("g").sessions.conduct
    for bars in range(3):
        for _ in range(rate_limits.VIOLATIONS_BEFORE_BAN):
            assert misbehave(speaker(), identity)[0] is grpc.StatusCode.INVALID_ARGUMENT
        if bars == 0:
            code, said = misbehave(speaker(), identity)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert re.match(r"banned for \d s: broke the protocol 5 times, last: ", said)
            assert_served(host_agent)
        if bars < 2:
            wait_until(lambda: not conduct.is_banned(time.monotonic()), "the bar to end")
    with pytest.raises(grpc.RpcError) as caught:
        host_agent.verify()
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "guest g: dropped: it broke the protocol 15 times" in str(caught.value.details())
    assert "broke the protocol" in host_agent.registry.get("g").evidence()
    assert_served(host_agent)


def test_a_wrong_token_is_no_violation_of_the_guest(
    host_agent: InProcessHost, speaker: Callable[[], Speaker], identity: Identity
) -> None:
    """Otherwise, anybody who knows the UUID of another guest could get that guest banned."""
    for _ in range(2 * rate_limits.VIOLATIONS_BEFORE_BAN):
        one = speaker()
        one.hello(identity[0], "0" * 32)
        assert one.refusal()[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert host_agent.registry.get("g").sessions.conduct.violations == 0
    one = speaker()
    one.hello(*identity)
    assert one.next().welcome.epoch


# Connections of clients that do not identify themselves


def test_streams_without_identity_make_room_for_others(
    host_agent: InProcessHost, speaker: Callable[[], Speaker]
) -> None:
    silent = [speaker() for _ in range(12)]
    with ThreadPoolExecutor(len(silent)) as pool:
        refusals = as_completed([pool.submit(one.refusal) for one in silent], HANG_S)
        codes = [refused.result()[0] for refused in itertools.islice(refusals, 4)]
        assert codes == [grpc.StatusCode.UNAVAILABLE] * 4, "long before their deadline"
        assert_served(host_agent)
        for one in silent:
            one.close()


def test_a_connection_that_says_nothing_is_closed(host_agent: InProcessHost) -> None:
    host, _, port = host_agent.guest_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=HANG_S) as silent:
        while silent.recv(4096):
            pass
    assert_served(host_agent)

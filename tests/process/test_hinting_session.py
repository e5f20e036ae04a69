"""How a host agent's servers answer guests that follow the hinting protocol, or break its rules."""

from collections.abc import Iterator

import grpc
import pytest

from hintfleet.ranges import RangeSet, encode
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, InProcessHost, host_in_process, wait_until
from tests.support.speaker import Speaker


@pytest.fixture
def guest(host_agent: InProcessHost) -> Iterator[Speaker]:
    speaker = Speaker(host_agent.guest_address)
    yield speaker
    speaker.close()


@pytest.fixture
def host_agent() -> Iterator[InProcessHost]:
    with host_in_process() as host:
        yield host


@pytest.fixture
def identity(host_agent: InProcessHost) -> tuple[str, str]:
    """Return UUID and token of a guest without hinting: a test can open the guest's session."""
    host_agent.watch()
    return host_agent.create(method=host_pb2.NONE).uuid, host_agent.token("g")


def test_a_batch_is_reclaimed_and_acknowledged(
    host_agent: InProcessHost, guest: Speaker, identity: tuple[str, str]
) -> None:
    host_agent.allocate(96 * MIB)
    guest.hello(*identity)
    welcome = guest.next().welcome
    everything = RangeSet([(0, 32768)])
    guest.batch(welcome.epoch, 1, everything)
    ack = guest.ack()
    assert (ack.epoch, ack.seq) == (welcome.epoch, 1)
    assert ack.reclaimed_bytes == 96 * MIB
    assert ack.absent_bytes == 32 * MIB
    # A guest that lies about free memory harms only itself: its own workload finds wrong pages.
    assert host_agent.verify().wrong_pages == 96 * MIB // 4096


def test_a_wrong_token_is_refused(guest: Speaker, identity: tuple[str, str]) -> None:
    guest.hello(identity[0], "0" * 32)
    code, said = guest.refusal()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "with that token" in said


def test_a_session_must_begin_with_hello(guest: Speaker) -> None:
    guest.batch(1, 1, RangeSet([(0, 512)]))
    assert guest.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_pages_outside_the_ram_are_skipped_with_the_reason(
    guest: Speaker, identity: tuple[str, str]
) -> None:
    guest.hello(*identity)
    welcome = guest.next().welcome
    guest.batch(welcome.epoch, 1, RangeSet([(32768, 512), (1 << 30, 512)]))
    (skipped,) = guest.ack().skipped
    assert skipped.reason == pb.OUTSIDE_RAM
    assert skipped.ranges == encode(RangeSet([(32768, 512), (1 << 30, 512)]))


def test_a_batch_of_an_earlier_epoch_is_skipped(
    host_agent: InProcessHost, guest: Speaker, identity: tuple[str, str]
) -> None:
    host_agent.allocate(96 * MIB)
    guest.hello(*identity)
    welcome = guest.next().welcome
    guest.batch(welcome.epoch - 1, 1, RangeSet([(0, 32768)]))
    ack = guest.ack()
    assert [s.reason for s in ack.skipped] == [pb.WRONG_EPOCH]
    assert ack.reclaimed_bytes == 0
    assert host_agent.verify().wrong_pages == 0


@pytest.mark.parametrize(
    ("ranges", "seq", "said"),
    [
        (encode(RangeSet([(0, 512)])), 2, "1 was due"),
        (b"", 1, "empty"),
        (b"\x00\x80", 1, "truncated"),
        (encode(RangeSet([(0, 1 << 21)])), 1, "limit"),
        (encode(RangeSet((n << 1, 1) for n in range(129))), 1, "more than 128 ranges"),
    ],
)
def test_violations_end_the_session_with_the_reason(
    guest: Speaker, identity: tuple[str, str], ranges: bytes, seq: int, said: str
) -> None:
    guest.hello(*identity)
    epoch = guest.next().welcome.epoch
    batch = pb.Batch(epoch=epoch, seq=seq, ranges=ranges)
    guest.outbox.put(pb.GuestMessage(batch=batch))
    code, details = guest.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in details


def test_the_newest_of_two_agents_wins(
    host_agent: InProcessHost, guest: Speaker, identity: tuple[str, str]
) -> None:
    guest.hello(*identity)
    first_epoch = guest.next().welcome.epoch
    second = Speaker(host_agent.guest_address)
    second.hello(*identity)
    assert second.next().welcome.epoch > first_epoch
    code, said = guest.refusal()
    assert code is grpc.StatusCode.UNAVAILABLE, "transient: its Hello may only have been late"
    assert "another agent" in said
    second.batch(second_epoch := host_agent.guests()["g"].epoch, 1, RangeSet([(0, 512)]))
    assert second.ack().epoch == second_epoch
    second.close()


def test_an_agent_that_was_superseded_comes_back(host_agent: InProcessHost, guest: Speaker) -> None:
    """Another Hello for its guest ends the agent's session. The agent must not end: the other Hello
    may only be an earlier one of its own, delivered late."""
    host_agent.watch()
    real = host_agent.create()
    guest.hello(real.uuid, host_agent.token("g"))
    assert guest.next().welcome.epoch > real.epoch
    assert guest.refusal()[0] is grpc.StatusCode.UNAVAILABLE, "superseded by the returning agent"
    wait_until(lambda: host_agent.guests()["g"].epoch > real.epoch + 1, "the agent's return")
    host_agent.allocate(32 * MIB)
    host_agent.free(32 * MIB)
    host_agent.settle()
    assert host_agent.guests()["g"].ledger.reclaimed_now_bytes == 32 * MIB


def test_the_address_for_guests_serves_no_control_api(host_agent: InProcessHost) -> None:
    from hintfleet.v1.host_pb2_grpc import HostServiceStub

    with grpc.insecure_channel(host_agent.guest_address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            HostServiceStub(channel).ListGuests(host_pb2.ListGuestsRequest(), timeout=HANG_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_guest_that_vanishes_leaves_the_others_alone(
    host_agent: InProcessHost, guest: Speaker, identity: tuple[str, str]
) -> None:
    host_agent.create("other")
    guest.hello(*identity)
    guest.next()
    guest.call.cancel()
    host_agent.allocate(32 * MIB, "other")
    host_agent.free(32 * MIB, "other")
    host_agent.settle("other")
    wait_until(
        lambda: host_agent.guests()["other"].ledger.reclaimed_now_bytes == 32 * MIB,
        "its books",
    )


@pytest.mark.parametrize("method", ["Session", "Workload"])
@pytest.mark.parametrize("at", [0, 1])
def test_bytes_that_are_no_message_are_refused(
    host_agent: InProcessHost, identity: tuple[str, str], method: str, at: int
) -> None:
    who = pb.Identity(guest_uuid=identity[0], token=identity[1])
    first = {
        "Session": pb.GuestMessage(hello=pb.Hello(identity=who, page_size_bytes=4096)),
        "Workload": pb.WorkloadEvent(attach=pb.Attach(identity=who)),
    }[method]
    frames = [*[first.SerializeToString()][:at], b"\xff\xff\xff"]
    with grpc.insecure_channel(host_agent.guest_address) as channel:
        call = channel.stream_stream(f"/hintfleet.v1.HintingService/{method}", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(frames), timeout=HANG_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in str(caught.value.details())

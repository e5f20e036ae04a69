"""Steps become commands to a guest's workload, and a guest's answer is checked before its use."""

import pytest

from hintfleet.errors import InvalidInput, Refused
from hintfleet.sketch import MOST_BUCKETS
from hintfleet.units import GIB, MIB
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.api.steps import command_of, response_of
from host_agent.session.validation import check_done

LOOP = pb.Loop(pattern=pb.Loop.CHURN, size_bytes=64 * MIB, duration_ms=1000, pause_ms=500)
REQUEST = host_pb2.RunStepRequest(guest_name="g", loop=LOOP, seed=7)


def test_a_loop_gets_the_seed_of_its_step() -> None:
    command = command_of(REQUEST, 5)
    assert command.command_id == 5
    assert (command.loop.size_bytes, command.loop.pause_ms, command.loop.seed) == (64 * MIB, 500, 7)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (host_pb2.RunStepRequest(), "no step"),
        (host_pb2.RunStepRequest(loop=pb.Loop(duration_ms=3_600_001)), "at most 3600 s"),
    ],
)
def test_impossible_steps_are_refused(request_: host_pb2.RunStepRequest, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        command_of(request_, 1)


def test_an_older_agent_that_ignored_a_loop_is_noticed() -> None:
    with pytest.raises(Refused, match="guest g: its agent is older"):
        response_of(REQUEST, pb.Done(), 0)
    answer = response_of(REQUEST, pb.Done(looped=pb.Looped(cycles=3)), 9)
    assert (answer.looped.cycles, answer.done_at_unix_us) == (3, 9)
    assert not response_of(host_pb2.RunStepRequest(verify=True), pb.Done(), 0).HasField("looped")


def looped(**values: object) -> pb.Done:
    return pb.Done(looped=pb.Looped(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "done",
    [
        pb.Done(verified_pages=GIB // 4096 + 1),
        looped(cycles=1 << 60),
        looped(touched_bytes=1 << 60),
        looped(allocation_us=pb.Sketch(first_bucket=1 << 31, counts=[1])),
        looped(allocation_us=pb.Sketch(counts=[1] * (MOST_BUCKETS + 1))),
        looped(bytes_per_s=pb.Sketch(counts=[1 << 63, 1 << 63])),
    ],
)
def test_what_no_guest_can_have_done(done: pb.Done) -> None:
    with pytest.raises(InvalidInput, match="the guest says that"):
        check_done(done, GIB)


def test_a_loop_may_verify_the_same_memory_often() -> None:
    done = looped(cycles=9, allocation_us=pb.Sketch(first_bucket=MOST_BUCKETS - 1, counts=[4]))
    done.verified_pages = 10 * GIB // 4096
    check_done(done, GIB)

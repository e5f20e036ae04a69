"""The balloon's rule, and a guest that follows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import GIB, KIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.balloon import BalloonStats, Rule

SPEC = host_pb2.GuestSpec(driver=host_pb2.LIBVIRT, memory_bytes=GIB, method=host_pb2.BALLOON)
RULE = Rule.of(SPEC)


def stats(size_mib: int, unused_mib: int) -> BalloonStats:
    return BalloonStats(size_bytes=size_mib * MIB, unused_bytes=unused_mib * MIB, said_at_s=1)


def test_the_target_falls_in_steps_and_rises_at_once() -> None:
    lower = RULE.next_target(stats(1024, 800))
    assert lower == pytest.approx(1024 * MIB * 0.95, rel=0.001)
    higher = RULE.next_target(stats(400, 5))
    assert higher == pytest.approx((395 + 102.4) * MIB, rel=0.001)


def test_a_guest_with_its_reserve_is_left_alone() -> None:
    assert RULE.next_target(stats(500, 102)) is None
    assert RULE.next_target(stats(500, 106)) is None
    assert RULE.next_target(stats(1024, 90)) is None, "it has all of its memory"


def test_settings() -> None:
    spec = host_pb2.GuestSpec()
    spec.CopyFrom(SPEC)
    spec.balloon.step_percent = 100
    spec.balloon.reserve_percent = 20
    target = Rule.of(spec).next_target(stats(1024, 924))
    assert target == pytest.approx((100 + 204.8) * MIB, rel=0.001)


@given(
    used_mib=st.integers(0, 1100),
    size_mib=st.integers(0, 1024),
    reserve=st.integers(1, 50),
    step=st.integers(1, 100),
)
def test_a_guest_that_follows_ends_with_what_it_uses_and_the_reserve(
    used_mib: int, size_mib: int, reserve: int, step: int
) -> None:
    spec = host_pb2.GuestSpec()
    spec.CopyFrom(SPEC)
    spec.balloon.reserve_percent, spec.balloon.step_percent = reserve, step
    rule = Rule.of(spec)
    size_bytes = size_mib * MIB
    for _ in range(400):
        unused_bytes = max(0, size_bytes - used_mib * MIB)
        said = BalloonStats(size_bytes=size_bytes, unused_bytes=unused_bytes, said_at_s=1)
        target = rule.next_target(said)
        if target is None:
            break
        assert target >= size_bytes - rule.step_bytes - KIB
        assert 0 < target <= GIB
        size_bytes = target
    else:
        raise AssertionError("it never came to rest")
    wanted = min(max(used_mib * MIB + rule.reserve_bytes, 64 * MIB), GIB)
    if used_mib * MIB <= size_bytes:
        assert abs(size_bytes - wanted) <= GIB * 0.006

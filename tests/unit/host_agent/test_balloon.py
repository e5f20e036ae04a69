"""The balloon's rule, and the loop that moves a guest's target; guests without the driver that a
peer needs, and guests that send no statistics; and how often statistics are read."""

import asyncio
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import GuestLost
from hintfleet.units import GIB, KIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.guests import balloon_loop
from host_agent.guests.balloon import SILENT_AFTER_S, BalloonStats, PollSchedule, Rule, Silence
from host_agent.guests.libvirt.domain_balloon import reporting_problem

SPEC = host_pb2.GuestSpec(driver=host_pb2.LIBVIRT, memory_bytes=GIB, method=host_pb2.BALLOON)
RULE = Rule.of(SPEC)


def stats(size_mib: int, unused_mib: int) -> BalloonStats:
    return BalloonStats(size_bytes=size_mib * MIB, unused_bytes=unused_mib * MIB, last_update_s=1)


def test_the_target_falls_in_steps_and_rises_at_once() -> None:
    lower = RULE.next_target(stats(1024, 800))
    assert lower == pytest.approx(1024 * MIB * 0.95, rel=0.001)
    higher = RULE.next_target(stats(400, 5))
    assert higher == pytest.approx((395 + 102.4) * MIB, rel=0.001)


def test_a_guest_with_its_reserve_is_left_alone() -> None:
    assert RULE.next_target(stats(500, 102)) is None
    assert RULE.next_target(stats(500, 106)) is None
    assert RULE.next_target(stats(1024, 90)) is None, "the guest has all of its memory already"


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
        said = BalloonStats(size_bytes=size_bytes, unused_bytes=unused_bytes, last_update_s=1)
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


def heard(*looks: tuple[float, int, int | None]) -> str:
    """Return the problem that `Silence` reports at the last of these looks: (now, time of the
    guest's last statistics, unused bytes)."""
    silence = Silence(0.0)
    found = ""
    for now_s, last_update_s, unused in looks:
        said = BalloonStats(size_bytes=GIB, unused_bytes=unused, last_update_s=last_update_s)
        found = silence.problem(said, now_s)
    return found


def test_a_guest_without_usable_statistics_cannot_be_followed() -> None:
    late_s = SILENT_AFTER_S + 1
    assert not heard((late_s - 2, 0, None)), "it may be slow"
    assert "no balloon driver sent statistics within 20 s" in heard((late_s, 0, None))
    assert "does not report unused memory" in heard((1, 1, None), (late_s, 20, None))
    assert "no more statistics for 20 s" in heard((1, 5, 5), (late_s, 5, 5), (2 * late_s, 5, 5))
    assert not heard((1, 5, 5), (late_s, 20, 5), (2 * late_s - 2, 20, 5))
    assert not heard((1, 1000, 5), (late_s, 5, 5)), "the clock was set back"
    assert (
        RULE.next_target(BalloonStats(size_bytes=GIB, unused_bytes=None, last_update_s=1)) is None
    )


class Idle:
    """The balloon of a guest whose target moves whenever the rule is asked.

    :ivar now_s: the time of the wall clock.
    """

    def __init__(self, reads: Iterable[tuple[float, int]]) -> None:
        self.now_s = 0.0
        self.moved_at_s: list[float] = []
        self._reads = iter(reads)

    def stats(self) -> BalloonStats:
        try:
            self.now_s, last_update_s = next(self._reads)
        except StopIteration:
            raise GuestLost("the test is over") from None
        return BalloonStats(size_bytes=GIB, unused_bytes=800 * MIB, last_update_s=last_update_s)

    def set_target(self, _size_bytes: int) -> None:
        self.moved_at_s.append(self.now_s)


async def at_once(_at_s: float) -> None:
    """Do not sleep."""


def moved(monkeypatch: pytest.MonkeyPatch, *reads: tuple[float, int]) -> list[float]:
    """Return when the target moves, if statistics are read at these times: (now, time of the
    guest's last statistics)."""
    balloon = Idle(reads)
    monkeypatch.setattr(balloon_loop, "sleep_until", at_once)
    monkeypatch.setattr(time, "time", lambda: balloon.now_s)
    with pytest.raises(GuestLost, match="the test is over"):
        asyncio.run(balloon_loop.follow(balloon, RULE, lambda: None, lambda: True))
    return balloon.moved_at_s


def test_the_target_moves_again_after_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moved(monkeypatch, (100.5, 100), (101.5, 100), (102.5, 102)) == [100.5, 102.5]


def test_the_target_moves_again_after_the_clock_was_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert moved(monkeypatch, (100.5, 100), (50.5, 100), (51.5, 51)) == [100.5, 51.5]


DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready"
REPORTS = "VIRTIO_BALLOON_F_REPORTING: Page reporting VQ available"


@pytest.mark.parametrize(
    ("status", "features", "problem"),
    [
        ([], [], "no driver"),
        (["VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found"], [REPORTS], "no driver"),
        ([DRIVER_OK], ["VIRTIO_BALLOON_F_STATS_VQ: Memory stats"], "no free page reporting"),
        ([DRIVER_OK], [REPORTS], ""),
    ],
)
def test_a_guest_that_does_not_report(status: list[str], features: list[str], problem: str) -> None:
    found = reporting_problem(status, features)
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_guest_at_rest_is_asked_every_fourth_time_and_at_once_when_memory_moves() -> None:
    schedule = PollSchedule()
    assert all(schedule.is_due(moved=False) for _ in range(10))
    resting = [schedule.is_due(moved=False) for _ in range(40)]
    assert resting.count(True) <= 12
    assert schedule.is_due(moved=True)
    assert all(schedule.is_due(moved=False) for _ in range(10)), "its next step may follow"

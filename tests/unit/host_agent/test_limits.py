"""Rate limits slow a hostile guest, and its violations ban it. A guest that keeps to its rates
never waits. Also figures that cannot be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput, LimitExceeded
from hintfleet.v1 import hinting_pb2
from host_agent.session.rate_limits import (
    BANS_S,
    BATCHES,
    FLOOD_S,
    MESSAGES,
    SESSIONS,
    STREAMS,
    VIOLATIONS_BEFORE_BAN,
    VIOLATIONS_WITHIN_S,
    Conduct,
    Rate,
    TokenBucket,
)
from host_agent.session.validation import check_settled

gaps = st.lists(st.floats(0, 0.5), min_size=1, max_size=200)


@given(gaps, st.floats(1, 100), st.integers(1, 20))
def test_a_guest_that_waits_as_told_never_exceeds_the_rate(
    gaps: list[float], per_s: float, burst: int
) -> None:
    pace, now_s, used = TokenBucket(Rate(per_s=per_s, burst=burst)), 0.0, []
    for gap_s in gaps:
        now_s += gap_s
        used.append(now_s)
        now_s += pace.take(now_s)
    for first, start_s in enumerate(used):
        for last in range(first, len(used)):
            most = burst + (used[last] - start_s) * per_s + 1
            assert last - first + 1 <= most + 1e-6


@given(gaps, st.floats(2, 100), st.integers(1, 20))
def test_a_guest_that_keeps_to_the_rate_never_waits(
    gaps: list[float], per_s: float, burst: int
) -> None:
    pace, now_s = TokenBucket(Rate(per_s=per_s, burst=burst)), 0.0
    for gap_s in gaps:
        assert pace.take(now_s) <= 1e-9
        now_s += gap_s + 1 / per_s


@given(gaps)
def test_held_time_counts_from_the_first_wait(gaps: list[float]) -> None:
    pace, now_s, since_s = TokenBucket(Rate(per_s=10, burst=3)), 0.0, math.inf
    for gap_s in gaps:
        now_s += gap_s
        since_s = min(since_s, now_s) if pace.take(now_s) else math.inf
        assert pace.held_for_s(now_s) == max(0.0, now_s - since_s)


def test_a_burst_then_the_rate() -> None:
    pace = TokenBucket(Rate(per_s=10, burst=3))
    assert [pace.take(0) for _ in range(5)] == [0, 0, 0, pytest.approx(0.1), pytest.approx(0.2)]
    assert pace.take(10) == 0


def test_a_flood_is_a_violation_only_if_it_goes_on() -> None:
    conduct, now_s = Conduct(), 0.0
    while now_s <= FLOOD_S:
        now_s += conduct.count_message(now_s)
    with pytest.raises(LimitExceeded, match="messages per second"):
        conduct.count_message(now_s)
    now_s += MESSAGES.burst / MESSAGES.per_s
    assert conduct.count_message(now_s) == 0, "after a pause it is none"


def test_batches_are_slowed_by_what_they_cost_and_are_no_violation() -> None:
    conduct, now_s, batches = Conduct(), 0.0, 0
    while now_s < 10 * FLOOD_S:
        now_s += conduct.count_batch(256, now_s)
        batches += 1
    assert batches == pytest.approx((BATCHES.burst + 10 * FLOOD_S * BATCHES.per_s) / 5, rel=0.01)
    assert conduct.count_message(now_s) == 0


def test_memory_in_pieces_delays_its_guest() -> None:
    conduct = Conduct()
    assert conduct.count_batch(2, 0) == 0
    conduct.count_pieces(32 * 1000, 0)
    assert conduct.count_batch(2, 0) == pytest.approx((1002 - BATCHES.burst) / BATCHES.per_s)
    conduct = Conduct()
    conduct.count_pieces(-100, 0)  # fewer pieces than ranges
    assert conduct.count_batch(2, 0) == 0


def test_streams_are_bounded_in_number() -> None:
    conduct = Conduct()
    closing = []
    for n in range(STREAMS):
        conduct.check_may_open(n / SESSIONS.per_s)
        closing.append(conduct.count_stream())
    with pytest.raises(LimitExceeded, match=f"{STREAMS} streams are open"):
        conduct.check_may_open(60)
    closing[3]()
    conduct.check_may_open(60)


def test_streams_are_bounded_in_rate() -> None:
    conduct = Conduct()
    for _ in range(SESSIONS.burst):
        conduct.check_may_open(0)
    for _ in range(SESSIONS.burst):
        with pytest.raises(LimitExceeded, match="per second"):
            conduct.check_may_open(0)
    conduct.check_may_open(1.01 / SESSIONS.per_s)  # refused streams do not count


def test_violations_far_apart_are_forgiven() -> None:
    conduct = Conduct()
    for n in range(10 * VIOLATIONS_BEFORE_BAN):
        at_s = n * (VIOLATIONS_WITHIN_S / (VIOLATIONS_BEFORE_BAN - 1) + 0.1)
        assert not conduct.count_violation(InvalidInput("no"), at_s)
        conduct.check_may_open(at_s)
    assert conduct.violations == 10 * VIOLATIONS_BEFORE_BAN


def test_bans_grow_and_the_last_is_for_ever() -> None:
    conduct, now_s = Conduct(), 0.0
    for ban_s in BANS_S:
        outcomes = [
            conduct.count_violation(InvalidInput("batch 2 is empty"), now_s)
            for _ in range(VIOLATIONS_BEFORE_BAN)
        ]
        assert outcomes == [False] * (VIOLATIONS_BEFORE_BAN - 1) + [ban_s == math.inf]
        assert conduct.is_banned(now_s)
        with pytest.raises(LimitExceeded, match="last: batch 2 is empty"):
            conduct.check_may_open(now_s + min(ban_s, 1e9) - 0.1)
        now_s += ban_s
    assert str(conduct) == "broke the protocol 15 times, last: batch 2 is empty"


def test_violations_after_the_last_ban_change_nothing() -> None:
    """They come on streams that were open when the ban began."""
    conduct = Conduct()
    for _ in range(2 * len(BANS_S) * VIOLATIONS_BEFORE_BAN):
        conduct.count_violation(InvalidInput("batch 2 is empty"), 1.0)
        assert conduct.is_banned(1e9) == (conduct.violations >= len(BANS_S) * VIOLATIONS_BEFORE_BAN)


def test_a_guest_without_violations_has_no_description() -> None:
    assert str(Conduct()) == ""


def test_an_answer_to_a_settle_request_has_possible_figures() -> None:
    check_settled(hinting_pb2.Settled(batches=3, hinted_pages=1 << 30))
    with pytest.raises(InvalidInput, match="hinted_pages"):
        check_settled(hinting_pb2.Settled(hinted_pages=1 << 52))

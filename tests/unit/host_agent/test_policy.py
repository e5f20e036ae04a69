"""Under policy `pressure`, which guests give memory, and how much; under policy `adaptive`, how a
full host shortens the time for which guests hold memory back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.pressure.policy import (
    LONGEST_HOLD_S,
    GuestView,
    Hold,
    HostView,
    Reason,
    Suggestion,
    patience,
    suggest,
)

MIB = 1 << 20


def host(resident_mib: int, now_s: float = 0.0) -> HostView:
    return HostView(
        now_s=now_s, resident_bytes=resident_mib * MIB, budget_bytes=1000 * MIB, threshold=0.8
    )


def guest(
    name: str, can_give_mib: int, reclaimed_mib: int = 0, refaulted_mib: int = 0
) -> GuestView:
    return GuestView(
        name=name,
        can_give_bytes=can_give_mib * MIB,
        chunk_bytes=MIB,
        reclaimed_total_bytes=reclaimed_mib * MIB,
        refaulted_total_bytes=refaulted_mib * MIB,
    )


def test_a_share_is_whole_chunks_or_nothing() -> None:
    """A guest hints whole chunks only. For a part of one, its kernel module would isolate a batch,
    and all of that would be hinted."""
    both = [replace(guest("a", 100), chunk_bytes=4 * MIB), guest("b", 1)]
    suggestions, _ = suggest(host(810), both, {})
    assert [one.allowance_bytes // MIB for one in suggestions] == [8, 0]
    assert [one.reason for one in suggestions] == [None, Reason.NOTHING_TO_GIVE]


def test_below_the_threshold_nobody_gives() -> None:
    suggestions, _ = suggest(host(800), [guest("a", 100)], {})
    assert suggestions == [Suggestion(name="a", allowance_bytes=0, reason=Reason.NO_PRESSURE)]


def test_guests_give_in_proportion_to_what_they_can() -> None:
    guests = [guest("a", 300), guest("b", 100), guest("c", 0)]
    suggestions, _ = suggest(host(900), guests, {})
    assert [s.allowance_bytes // MIB for s in suggestions] == [75, 25, 0]
    assert suggestions[2].reason is Reason.NOTHING_TO_GIVE


@given(
    st.integers(0, 2000),
    st.lists(st.integers(0, 500), min_size=1, max_size=8),
)
def test_never_more_than_is_wanted_nor_than_there_is(
    resident_mib: int, can_give: list[int]
) -> None:
    view = host(resident_mib)
    guests = [guest(f"g{n}", mib) for n, mib in enumerate(can_give)]
    suggestions, _ = suggest(view, guests, {})
    assert sum(s.allowance_bytes for s in suggestions) <= view.excess_bytes
    for seen, said in zip(guests, suggestions, strict=True):
        assert said.allowance_bytes <= seen.can_give_bytes
        assert (said.allowance_bytes == 0) == (said.reason is not None)


def test_a_guest_that_takes_back_what_it_gave_is_held_longer_each_time() -> None:
    holds: dict[str, Hold] = {}
    now_s, total = 0.0, 0
    lengths = []
    for _ in range(10):
        _, holds = suggest(host(900, now_s), [guest("a", 100, total, total)], holds)
        total += 100
        suggestions, holds = suggest(host(900, now_s), [guest("a", 100, total, total)], holds)
        assert suggestions[0].reason is Reason.OSCILLATES
        lengths.append(holds["a"].length_s)
        now_s = holds["a"].until_s
    assert lengths[:4] == [1, 2, 4, 8]
    assert lengths[-1] == LONGEST_HOLD_S


def test_a_held_guest_is_left_alone_until_its_time_and_then_asked_again() -> None:
    _, holds = suggest(host(900, 0), [guest("a", 100, 0, 0)], {})
    _, holds = suggest(host(900, 1), [guest("a", 100, 50, 50)], holds)
    held, holds = suggest(host(900, 1.5), [guest("a", 100, 50, 50)], holds)
    assert held[0].reason is Reason.OSCILLATES
    asked, holds = suggest(host(900, 2.0), [guest("a", 100, 50, 50)], holds)
    assert asked[0].allowance_bytes > 0


def test_others_give_in_place_of_a_held_guest() -> None:
    holds = {"a": Hold(until_s=10, length_s=8)}
    suggestions, _ = suggest(host(900, 5), [guest("a", 300), guest("b", 300)], holds)
    assert [s.allowance_bytes // MIB for s in suggestions] == [0, 100]


def test_a_guest_that_behaves_is_forgiven_in_steps() -> None:
    holds = {"a": Hold(until_s=0, length_s=8)}
    _, holds = suggest(host(900, 1), [guest("a", 100, 100, 0)], holds)
    assert holds["a"].length_s == 4


@pytest.mark.parametrize(
    ("resident_bytes", "share"), [(0, 1), (800, 1), (801, 1), (851, 0.75), (995, 0.125), (1000, 0)]
)
def test_the_fuller_the_host_the_shorter_memory_is_held_back(
    resident_bytes: int, share: float
) -> None:
    host = HostView(now_s=0, resident_bytes=resident_bytes, budget_bytes=1000, threshold=0.8)
    assert patience(host, 1.0) == share


def test_over_the_budget_nothing_is_held_back() -> None:
    host = HostView(now_s=0, resident_bytes=3000, budget_bytes=1000, threshold=1.0)
    assert patience(host, 1.0) == 0


def test_what_is_held_back_again_does_not_lower_it_at_once() -> None:
    def at(resident_bytes: int, before: float) -> float:
        host = HostView(now_s=0, resident_bytes=resident_bytes, budget_bytes=1000, threshold=0.8)
        return patience(host, before)

    assert at(851, 1.0) == 0.75
    assert at(849, 0.75) == 0.75, "not even half a step more"
    assert at(830, 0.75) == 0.875
    assert at(800, 0.75) == 1
    assert at(990, 0.75) == 0.125, "and down at once"

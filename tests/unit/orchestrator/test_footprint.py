"""Footprints of trials agree with values computed by hand. Missing samples, steps or books make
them undecided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import GIB
from orchestrator.results.footprint import (
    Series,
    Undecided,
    coincidence,
    guest_footprint,
    host_footprint,
)
from orchestrator.trial.records import GuestEnded, StepDone

S = 1_000_000
G = GIB


def series(*points: tuple[float, int]) -> Series:
    return Series(
        at_unix_us=np.array([round(at * S) for at, _ in points], dtype=np.int64),
        resident_bytes=np.array([resident for _, resident in points], dtype=np.uint64),
    )


def step(
    kind: str, start: float, end: float, changed: int = 0, wrong: int = 0, held: int = 0
) -> StepDone:
    return StepDone(
        host="h",
        trial_id="t",
        guest="g",
        at_unix_us=round(end * S),
        kind=kind,
        changed_bytes=changed,
        held_bytes=held,
        verified_pages=10,
        wrong_pages=wrong,
        duration_us=round((end - start) * S),
    )


ENDED = GuestEnded(
    host="h",
    trial_id="t",
    guest="g",
    at_unix_us=0,
    provisioned_bytes=8 * G,
    reclaimed_now_bytes=3 * G,
    refaulted_total_bytes=G,
)


def test_a_step_function() -> None:
    samples = series((0, 0), (1, 0), (2, 4 * G), (6, 4 * G), (6.5, G), (20, G))
    steps = [step("allocate", 1, 2), step("free", 6, 6.2, changed=3 * G), step("verify", 11, 12)]
    found = guest_footprint("g", samples, steps, ENDED, period_s=2)
    assert found.peak_resident_bytes == 4 * G
    # GiB resident, by seconds: 1..2 a ramp from 0 to 4; 2..6: 4; 6..6.5 a ramp to 1; 6.5..11: 1
    gib_s = 2 + 16 + 1.25 + 4.5
    assert found.resident_gib_min == pytest.approx(gib_s / 60)
    assert found.mean_resident_bytes == pytest.approx(gib_s / 10 * G)
    assert found.verified_pages == 30
    assert found.returned is not None
    assert found.returned.freed_bytes == 3 * G
    assert found.returned.after_s == 3
    assert found.returned.share == 1


def test_returned_is_looked_at_before_the_next_step() -> None:
    samples = series(*((t / 10, 2 * G if t < 30 else G) for t in range(80)))
    steps = [
        step("allocate", 0.5, 0.6),
        step("free", 1.0, 1.0, changed=2 * G),
        step("free", 3.5, 3.5, changed=2 * G),
        step("verify", 6, 6.1),
    ]
    found = guest_footprint("g", samples, steps, ENDED, period_s=0.1).returned
    assert found is not None
    assert found.after_s == 2.5
    assert found.left_bytes == G


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ((0, 1, 2, 9, 10), "missing for 7.0 s"),
        ((2, 3, 4, 5, 6, 7, 8, 9, 10), "at the start"),
        ((0, 1, 2, 3, 4, 5, 6), "or the end"),
    ],
)
def test_missing_samples_are_undecided(times: tuple[int, ...], why: str) -> None:
    steps = [step("allocate", 1, 2), step("verify", 8, 9)]
    with pytest.raises(Undecided, match=why):
        guest_footprint("g", series(*((t, G) for t in times)), steps, ENDED, period_s=0.6)


def test_a_machine_that_stands_still_for_a_second_spoils_no_trial() -> None:
    times = [t / 10 for t in range(101) if not 30 < t < 48]
    steps = [step("allocate", 1, 2), step("verify", 8, 9)]
    samples = series(*((t, G) for t in times))
    found = guest_footprint("g", samples, steps, ENDED, period_s=0.1)
    assert found.mean_resident_bytes == pytest.approx(G)


def test_a_workload_cut_short_is_undecided() -> None:
    with pytest.raises(Undecided, match="the workload did not finish"):
        guest_footprint("g", series((0, 0), (9, 0)), [step("allocate", 1, 2)], ENDED, period_s=9)


def test_books_left_open_are_undecided() -> None:
    steps = [step("allocate", 1, 2), step("verify", 8, 9)]
    with pytest.raises(Undecided, match="books"):
        guest_footprint("g", series((0, 0), (9, 0)), steps, None, period_s=9)


def peak(at: float, size: int) -> list[StepDone]:
    """Return the steps of a guest that holds this much for a second."""
    return [
        step("allocate", at, at + 0.1, held=size),
        step("free", at + 1, at + 1.1),
        step("verify", 9, 9.1),
    ]


@pytest.mark.parametrize(
    ("peaks", "share"),
    [
        (((0, 2 * G), (0, 2 * G)), 1.0),
        (((0, 2 * G), (0.5, 2 * G)), 1.0),
        (((0, 2 * G), (2, 2 * G)), 0.5),
        (((0, 3 * G), (2, 1 * G)), 0.75),
        (((0, 1 * G), (2, 1 * G), (4, 1 * G), (4.5, 1 * G)), 0.5),
        (((0, 2 * G),), None),
        (((0, 0), (1, 0)), None),
    ],
)
def test_how_far_peaks_coincide(peaks: list[tuple[float, int]], share: float | None) -> None:
    steps = {f"guest{i}": peak(at, size) for i, (at, size) in enumerate(peaks)}
    assert coincidence(steps) == share


def test_what_a_replay_holds_meanwhile_is_not_known() -> None:
    replayed = [step("replay", 0, 1, held=G), step("verify", 2, 3)]
    assert coincidence({"a": replayed, "b": peak(0, G)}) is None


def test_wrong_pages_are_counted() -> None:
    steps = [step("allocate", 1, 2), step("verify", 8, 9, wrong=2)]
    found = guest_footprint("g", series((0, 0), (9, 0)), steps, ENDED, period_s=9)
    assert found.wrong_pages == 2


def test_a_host_is_the_sum_of_its_guests_at_each_time() -> None:
    # Guest a falls while b rises, so the host's peak is that of one guest, not the sum of both.
    a = series((0, 0), (1, 4 * G), (2, 4 * G), (3, 0), (4, 0), (9, 0))
    b = series((0, 0), (1, 0), (2, 0), (3, 4 * G), (4, 4 * G), (9, 4 * G))
    steps = [step("allocate", 1, 1), step("verify", 4, 5)]
    guests = [guest_footprint("g", s, steps, ENDED, period_s=5) for s in (a, b)]
    whole = host_footprint({"a": a, "b": b}, {"a": steps, "b": steps}, guests)
    assert whole.peak_resident_bytes == 4 * G
    assert whole.provisioned_bytes == 16 * G
    assert whole.resident_gib_min == pytest.approx(sum(g.resident_gib_min for g in guests))


@given(st.lists(st.integers(0, 64 * G), min_size=4, max_size=40))
def test_mean_lies_between_the_extremes(values: list[int]) -> None:
    samples = series(*((float(i), value) for i, value in enumerate(values)))
    end = len(values) - 1
    steps = [step("allocate", 0.5, 0.5), step("verify", end - 0.5, end)]
    found = guest_footprint("g", samples, steps, ENDED, period_s=1)
    slack = 1 + max(values) * 1e-9
    assert min(values) - slack <= found.mean_resident_bytes <= found.peak_resident_bytes + slack
    assert found.peak_resident_bytes <= max(values)

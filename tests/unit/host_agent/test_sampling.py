"""Only samples that hardly differ from the last one sent are left out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.api.sampling import SampleFilter

PERIOD_S = 0.5


def made(n: int, resident_bytes: int, hinted_bytes: int = 0) -> host_pb2.SampleSet:
    """Return a sample set with the n-th sample of guest `g`, PERIOD_S after the one before."""
    ledger = host_pb2.Ledger(resident_bytes=resident_bytes, hinted_total_bytes=hinted_bytes)
    sample = host_pb2.Sample(guest_name="g", ledger=ledger)
    return host_pb2.SampleSet(at_unix_us=round(n * PERIOD_S * 1e6), samples=[sample])


def sent(sets: list[host_pb2.SampleSet]) -> list[host_pb2.SampleSet]:
    sample_filter = SampleFilter()
    return [one for each in sets for one in sample_filter.to_send(each)]


def test_every_fourth_sample_of_a_guest_at_rest_is_sent() -> None:
    numbers = [
        round(one.at_unix_us / 1e6 / PERIOD_S) for one in sent([made(n, 0) for n in range(9)])
    ]
    assert numbers == [0, 4, 8]


def test_the_sample_before_a_change_is_sent_with_it() -> None:
    seen = sent([made(0, 0), made(1, 0), made(2, 0), made(3, 64 * MIB)])
    assert [one.at_unix_us for one in seen] == [0, 1_000_000, 1_500_000]


def test_a_change_of_the_books_is_sent_at_once() -> None:
    assert len(sent([made(0, 0), made(1, 0, hinted_bytes=4096)])) == 2


def test_a_sample_is_sent_after_a_command() -> None:
    sample_filter = SampleFilter()
    assert list(sample_filter.to_send(made(0, 0)))
    assert not list(sample_filter.to_send(made(1, 0)))
    assert len(list(sample_filter.to_send(made(2, 0), commanded=True))) == 2


def test_a_new_guest_is_sent_at_once() -> None:
    two = made(1, 0)
    two.samples.append(host_pb2.Sample(guest_name="h"))
    assert len(sent([made(0, 0), two])) == 2


def test_that_the_budget_is_exceeded_is_sent_at_once_however_little_it_is() -> None:
    sets = [made(n, 0) for n in range(3)]
    for each, used_bytes in zip(sets, (99, 100, 101), strict=True):
        each.budget_use.CopyFrom(host_pb2.BudgetUse(used_bytes=used_bytes, limit_bytes=100))
    assert [one.budget_use.used_bytes for one in sent(sets)] == [99, 100, 101]


@given(st.lists(st.integers(0, 4 * MIB), min_size=2, max_size=30))
def test_interpolated_samples_are_never_far_from_the_real_ones(resident: list[int]) -> None:
    sets = [made(n, size_bytes) for n, size_bytes in enumerate(resident)]
    seen = sent(sets)
    last_us = seen[-1].at_unix_us
    known = [one for one in sets if one.at_unix_us <= last_us]
    line = np.interp(
        [one.at_unix_us for one in known],
        [one.at_unix_us for one in seen],
        [one.samples[0].ledger.resident_bytes for one in seen],
    )
    truth = np.array([one.samples[0].ledger.resident_bytes for one in known])
    assert np.abs(line - truth).max() < 2 * MIB

"""The hugetlb isolator on stock kernels: what it refuses, its spike, an agent's death."""

import re
from typing import Any

import pytest

from hintfleet.units import MIB
from tests.support.vm import Guests, console

pytestmark = pytest.mark.vm

FREED_BYTES = 300 * MIB


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pool-in-use", "the hugetlb pool is in use: nr_hugepages is 4"),
        ("overcommit", "nr_overcommit_hugepages is 4"),
    ],
)
def test_a_guest_where_it_would_be_unsafe_is_refused(guests: Guests, name: str, said: str) -> None:
    failure = guests.failure(name)
    assert said in failure
    assert "try: " in failure
    assert "kmod" in failure


def test_what_a_dead_agent_isolated_stays_so_until_the_next_is_welcomed(guests: Guests) -> None:
    said = console(guests["hugetlb"].pid)
    assert "the agent was killed (status 137)" in said
    found = re.search(
        r"PROBE found PoolState\(total=(\d+), free=(\d+), reserved=(\d+), surplus=0\),"
        r" adopted (\d+)",
        said,
    )
    assert found, said
    total, free, reserved, adopted = map(int, found.groups())
    assert total == free == reserved == adopted > 100, "somebody could have used them"
    # What it found was released after the welcome, and has been hinted since.
    guests.host.settle("hugetlb")
    assert guests.ledger("hugetlb").hinted_total_bytes >= adopted * 2 * MIB


def test_zeroing_costs_no_more_than_64_mib_at_a_time(guests: Guests, connection: Any) -> None:
    host = guests.host
    assert "init_on_alloc=1" in console(guests["zeroing"].pid)
    host.settle("zeroing")
    at_first_bytes = guests.ledger("zeroing").resident_bytes
    host.allocate(FREED_BYTES, "zeroing")
    highest_bytes = max(guests.ledger("zeroing").resident_bytes, at_first_bytes + FREED_BYTES)
    seen_before = len(host.samples)
    host.free(FREED_BYTES, "zeroing")
    guests.falls_to("zeroing", at_first_bytes + FREED_BYTES // 10, timeout_s=10)
    spike_bytes = max(
        sample.ledger.resident_bytes - highest_bytes
        for samples in host.samples[seen_before:]
        for sample in samples.samples
        if sample.guest_name == "zeroing"
    )
    assert spike_bytes <= 64 * MIB
    host.settle("zeroing")
    guests.balances("zeroing", connection)


def test_init_on_alloc_off_is_seen(guests: Guests) -> None:
    assert "init_on_alloc=0" in console(guests["hugetlb"].pid)

"""DIMMs of a real guest are plugged and unplugged while hinting or free page reporting runs. A DIMM
that the guest uses or does not eject stays."""

from typing import Any

import grpc
import pytest

from hintfleet.units import GIB, MIB
from tests.support.vm import Guests

GUESTS = ("kmod", "hugetlb", "reporting", "zeroing")
START = GIB
MOST = GIB + 512 * MIB
MORE_THAN_START = GIB + 64 * MIB
STAYS = 128 * MIB


@pytest.mark.parametrize("name", ["kmod", "hugetlb"])
def test_a_dimm_is_plugged_hinted_and_unplugged(guests: Guests, connection: Any, name: str) -> None:
    host = guests.host
    host.free(START, name)  # what an earlier test held
    at_first_bytes = host.settle(name).ledger.resident_bytes

    assert host.resize(MOST, name).ledger.provisioned_bytes == MOST
    guests.balances(name, connection)
    host.allocate(MORE_THAN_START + STAYS, name)
    dirty = guests.ledger(name)
    assert dirty.resident_bytes > MORE_THAN_START + STAYS
    assert host.free(MORE_THAN_START, name).wrong_pages == 0
    books = host.settle(name).ledger
    # The guest's kernel keeps a struct page of 64 bytes for each page of the DIMM.
    grown_bytes = books.resident_bytes - at_first_bytes - STAYS - (MOST - START) // 64
    assert grown_bytes < MORE_THAN_START // 10, "what was freed is reclaimed"
    guests.balances(name, connection)

    # Before the DIMM is unplugged, the guest's kernel moves the workload's pages out of it.
    assert host.resize(START, name).ledger.provisioned_bytes == START
    assert guests.ledger(name).unplugged_total_bytes > 0
    guests.balances(name, connection)
    assert host.verify(name).wrong_pages == 0

    # What the agent remembers about the unplugged DIMM must not make it miss memory that is freed
    # later.
    before_bytes = host.settle(name).ledger.resident_bytes
    host.allocate(300 * MIB, name)
    assert host.free(300 * MIB + STAYS, name).wrong_pages == 0
    guests.falls_to(name, before_bytes - STAYS + 60 * MIB)
    assert not host.settle(name).ledger.skipped_total_bytes.get("outside_ram")
    guests.balances(name, connection)


def test_dimms_are_unplugged_whole(guests: Guests) -> None:
    host = guests.host
    host.free(START, "kmod")
    host.resize(START + 128 * MIB, "kmod")
    host.resize(START + 384 * MIB, "kmod")
    with pytest.raises(grpc.RpcError, match="DIMMs of 128 MiB, 256 MiB"):
        host.resize(START + 256 * MIB, "kmod")
    assert host.resize(START + 128 * MIB, "kmod").ledger.provisioned_bytes == START + 128 * MIB
    assert host.resize(START, "kmod").ledger.provisioned_bytes == START


def test_a_peer_is_resized_too(guests: Guests, connection: Any) -> None:
    host = guests.host
    host.resize(MOST, "reporting")
    host.allocate(300 * MIB, "reporting")  # the guest's kernel allocates from the DIMM first
    assert host.free(300 * MIB, "reporting").wrong_pages == 0
    guests.balances("reporting", connection)
    host.resize(START, "reporting")
    guests.balances("reporting", connection)


def test_a_dimm_that_is_in_use_or_not_ejected_stays(guests: Guests, connection: Any) -> None:
    """This guest's kernel was told to eject no DIMM; it still takes their memory offline."""
    host, most = guests.host, 768 * MIB
    host.resize(most, "zeroing")
    host.allocate(540 * MIB, "zeroing")
    with pytest.raises(grpc.RpcError, match="the memory is in use") as caught:
        host.resize(640 * MIB, "zeroing")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    host.free(540 * MIB, "zeroing")
    with pytest.raises(grpc.RpcError, match="dimm0") as caught:
        host.resize(640 * MIB, "zeroing")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert guests.ledger("zeroing").provisioned_bytes == most
    assert host.allocate(540 * MIB, "zeroing").held_bytes == 540 * MIB, "online again"
    assert host.free(540 * MIB, "zeroing").wrong_pages == 0
    guests.balances("zeroing", connection)

"""The books of real guests show what free page reporting and the balloon take. An embedded guest
with one of these methods is refused."""

from typing import Any

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, TRIAL
from tests.support.vm import Guests

GUESTS = ("reporting", "balloon")
FREED_BYTES = 300 * MIB


# A balloon leaves a tenth of the memory free in the guest. This reserve is resident, so less comes
# back than under reporting.
@pytest.mark.parametrize(("name", "share"), [("reporting", 0.9), ("balloon", 0.6)])
def test_what_a_peer_takes_back_is_in_the_books(
    guests: Guests, connection: Any, name: str, share: float
) -> None:
    host = guests.host
    before = guests.ledger(name)
    host.allocate(FREED_BYTES, name)
    full_bytes = guests.ledger(name).resident_bytes
    assert full_bytes > before.resident_bytes + 0.9 * FREED_BYTES
    host.free(FREED_BYTES, name)
    guests.falls_to(name, full_bytes - int(share * FREED_BYTES))
    host.settle(name)
    after = guests.ledger(name)
    assert not after.hinted_total_bytes
    assert after.reclaimed_total_bytes - before.reclaimed_total_bytes > share * FREED_BYTES
    guests.balances(name, connection)
    assert host.verify(name).wrong_pages == 0


def test_a_balloon_gives_memory_back_to_a_guest_that_needs_it(guests: Guests) -> None:
    host = guests.host
    shrunk = guests.ledger("balloon")
    done = host.allocate(FREED_BYTES, "balloon")
    assert done.changed_bytes == FREED_BYTES
    now = guests.ledger("balloon")
    assert now.refaulted_total_bytes - shrunk.refaulted_total_bytes > 0.5 * FREED_BYTES


@pytest.mark.parametrize("method", [host_pb2.REPORTING, host_pb2.BALLOON])
def test_an_embedded_guest_has_no_peers(guests: Guests, method: host_pb2.Method.ValueType) -> None:
    spec = host_pb2.GuestSpec(driver=host_pb2.EMBEDDED, memory_bytes=128 * MIB, method=method)
    with pytest.raises(grpc.RpcError) as caught:
        guests.host.stub.CreateGuest(
            host_pb2.CreateGuestRequest(
                command=host_pb2.CommandId(trial_id=TRIAL), name="embedded", spec=spec
            ),
            timeout=HANG_S,
        )
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"no method {host_pb2.Method.Name(method).lower()}" in str(caught.value.details())

"""A guest that lies about its free memory does not seem to have more to give than is resident, so
that policy `pressure` still asks the others."""

from hintfleet.units import GIB, MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.guest import Guest
from host_agent.pressure.loop import view_of


def guest(free_bytes: int) -> Guest:
    spec = host_pb2.GuestSpec(memory_bytes=GIB, method=host_pb2.HINTING)
    made = Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)
    made.sessions.telemetry = hinting_pb2.Telemetry(free_bytes=free_bytes)
    return made


def test_no_guest_can_give_more_than_is_resident() -> None:
    ledger = host_pb2.Ledger(
        provisioned_bytes=GIB,
        resident_bytes=600 * MIB,
        reclaimed_now_bytes=300 * MIB,
        untouched_bytes=124 * MIB,
    )
    assert view_of(guest(700 * MIB), ledger).can_give_bytes == 276 * MIB
    assert view_of(guest(100 * MIB), ledger).can_give_bytes == 0
    assert view_of(guest(1 << 52), ledger).can_give_bytes == 600 * MIB

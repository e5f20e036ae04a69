"""The setting for torture of embedded guests: six small ones."""

from __future__ import annotations

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.torture import injectors
from tests.torture.guest import Victim
from tests.torture.place import Deadlines
from tests.torture.plan import Kind, Pace
from tests.torture.run import Setting

_MEMORY_BYTES = 128 * MIB
_GUESTS = 6


def _spec(number: int) -> host_pb2.GuestSpec:
    return host_pb2.GuestSpec(
        driver=host_pb2.EMBEDDED,
        memory_bytes=_MEMORY_BYTES,
        max_memory_bytes=2 * _MEMORY_BYTES,
        method=host_pb2.HINTING,
        hinting=host_pb2.HintingSettings(
            tracker=("bitmap", "reported")[number % 2],
            chunk_order=(9, 9, 7)[number % 3],
            # Most guests are eager: they hint memory even if it is used again a moment later.
            policy="adaptive" if number == _GUESTS - 1 else "eager",
            # Look for free chunks every 20 ms, and hint at once if two wait to be hinted.
            report_period_ms=20,
            threshold_chunks=2,
        ),
    )


SETTING = Setting(
    driver="embedded",
    guests={f"embedded{number}": _spec(number) for number in range(_GUESTS)},
    kinds={
        Kind.LINK_CUT: 12,
        Kind.LINK_STALLED: 8,
        Kind.LINK_DELAYED: 4,
        Kind.SESSION_REPLAYED: 8,
        Kind.SECOND_AGENT: 6,
        Kind.BOOT_ID_CHANGED: 2,
        Kind.GUEST_SUSPENDED: 8,
        Kind.MEMORY_RESIZED: 3,
        Kind.GUEST_KILLED: 1,
    },
    host_kinds={Kind.HOST_AGENT_SUSPENDED: 12, Kind.HOST_AGENT_KILLED: 1},
    injectors=injectors.EMBEDDED,
    pace=Pace(pause_s=0.04, lag_s=0.005, hold_s=0.12),
    deadlines=Deadlines(create_s=60, step_s=60, silence_s=120),
    advertise=str,
    victim_of=Victim.of,
    longest_wait_s=0.1,
)

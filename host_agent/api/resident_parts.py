"""What a guest's resident memory consists of. Pure.

The guest knows what its pages are used for, and not which of them are resident. The host knows how
many are resident, and not what for. Two assumptions put both together:

1. What the guest's kernel does not have is absent: memory that is plugged and not online, what is
   kept for a crash kernel, holes of the firmware (less than 1 MiB of them is resident).
2. All other absent memory is free: it lies in whole chunks, in the guest's allocator or isolated,
   because only these are hinted; and where these cannot hold all of it, in pieces of chunks that
   were absent when the allocator split them.

So what is resident of free memory is known, and the parts should leave nothing over. What they do
leave over (`unexplained_bytes`) is shown, and no part is adjusted for it:

- less than nothing, if more is absent than is free. Then assumption 2 is wrong: memory that is in
  use by the guest's figures is absent (never touched, or in a balloon). If there is less of such
  memory than of resident free memory, this is not seen: the parts that are free memory are too
  small instead, `waiting_bytes` first.
- more than nothing, if more is resident than the guest's kernel has. Then assumption 1 is wrong.
- less or more than nothing, if the guest's figures do not add up to its memory.

The guest's and the host's figures must be of the same moment, so they are combined when telemetry
comes. What the guest allocates between its count and the host's, milliseconds later, is counted in
`waiting_bytes`.
"""

from __future__ import annotations

from hintfleet.v1 import hinting_pb2, host_pb2

_MOST_MS = (1 << 32) - 1


def resident_parts(
    ledger: host_pb2.Ledger, told: hinting_pb2.Telemetry
) -> host_pb2.ResidentParts | None:
    """Combine a guest's books with the telemetry that has just come.

    Return None if the telemetry does not say what the memory is used for, or if that is about more
    memory than the host knows of. `age_ms` of the result is 0.

    :param told: checked by `check_telemetry`.
    """
    use = told.memory
    if not told.HasField("memory") or use.total_bytes > ledger.provisioned_bytes:
        return None
    absent_bytes = use.total_bytes - ledger.resident_bytes
    free_bytes = use.free_chunks_bytes + use.isolated_bytes
    resident_free_bytes = max(0, min(free_bytes, free_bytes - absent_bytes))
    in_flight_bytes = min(use.isolated_bytes, resident_free_bytes)
    held_back_bytes = min(told.held_back_bytes, resident_free_bytes - in_flight_bytes)
    pieces_bytes = use.free_pieces_bytes - min(
        use.free_pieces_bytes, max(0, absent_bytes - free_bytes)
    )
    others_bytes = use.used_bytes + use.file_cache_bytes + pieces_bytes
    return host_pb2.ResidentParts(
        resident_bytes=ledger.resident_bytes,
        used_bytes=use.used_bytes,
        file_cache_bytes=use.file_cache_bytes,
        held_back_bytes=held_back_bytes,
        held_back_for_ms=told.held_back_for_ms if held_back_bytes else 0,
        free_pieces_bytes=pieces_bytes,
        in_flight_bytes=in_flight_bytes,
        waiting_bytes=resident_free_bytes - in_flight_bytes - held_back_bytes,
        unexplained_bytes=ledger.resident_bytes - others_bytes - resident_free_bytes,
    )


def aged(parts: host_pb2.ResidentParts | None, age_s: float) -> host_pb2.ResidentParts | None:
    """Return a copy of parts that were computed `age_s` ago, with their age, and with what is left
    of `held_back_for_ms`; None for None."""
    if parts is None:
        return None
    shown = host_pb2.ResidentParts()
    shown.CopyFrom(parts)
    shown.age_ms = min(round(age_s * 1000), _MOST_MS)
    shown.held_back_for_ms = max(0, parts.held_back_for_ms - shown.age_ms)
    return shown

"""What the host does with a batch: drop the memory behind it, and say what was there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.ram import GuestRam

Skips = Mapping["pb.SkipReason.ValueType", RangeSet]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of hinted pages: each is in exactly one of these sets.

    :ivar reclaimed: resident before, absent after.
    :ivar absent: nothing was resident there.
    :ivar skipped: not touched, by reason.
    """

    reclaimed: RangeSet = EMPTY
    absent: RangeSet = EMPTY
    skipped: Skips = field(default_factory=dict)


def skip(hinted: RangeSet, reason: pb.SkipReason.ValueType) -> Outcome:
    """Leave a whole batch alone."""
    return Outcome(skipped={reason: hinted})


def reclaim(ram: GuestRam, hinted: RangeSet, maybe_absent: RangeSet) -> Outcome:
    """Punch holes where `hinted` lies in the guest's RAM (I3) and something is resident.

    :param maybe_absent: pages that may be absent, from the ledger; every other page
        of the RAM is resident. Only these are looked up in the file, so that a batch
        of memory that was in use costs the punches and nothing else.

    The set has merged adjacent ranges, so that each run is one system call. What
    lies outside the RAM, or what the host's kernel would not drop, is skipped;
    the file itself says afterwards which that is.
    """
    inside = hinted & ram.pages
    unsure = inside & maybe_absent
    resident = (inside - unsure) | ram.resident(unsure)
    skipped: dict[pb.SkipReason.ValueType, RangeSet] = {}
    if outside := hinted - ram.pages:
        skipped[pb.OUTSIDE_RAM] = outside
    try:
        ram.punch(inside.touching(resident))
        left = EMPTY
    except OSError:
        left = ram.resident(inside)
        skipped[pb.HOST_ERROR] = left
    return Outcome(reclaimed=resident - left, absent=inside - resident - left, skipped=skipped)

"""What the host does with a batch: drop the memory behind it, and say what was there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.page_map import NO_PAGES, PageMap
from host_agent.memory.ram import GuestRam

Skips = Mapping["pb.SkipReason.ValueType", RangeSet]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of hinted pages: each is in exactly one of these sets.

    :ivar reclaimed: resident before, absent after.
    :ivar absent: nothing was resident there.
    :ivar skipped: not touched, by reason.
    """

    reclaimed: PageMap = NO_PAGES
    absent: PageMap = NO_PAGES
    skipped: Skips = field(default_factory=dict)


def skip(hinted: RangeSet, reason: pb.SkipReason.ValueType) -> Outcome:
    """Leave a whole batch alone."""
    return Outcome(skipped={reason: hinted})


def reclaim(ram: GuestRam, hinted: RangeSet, maybe_absent: PageMap) -> Outcome:
    """Punch holes where `hinted` lies in the guest's RAM (I3) and something is resident.

    :param maybe_absent: pages that may be absent, from the ledger; every other page
        of the RAM is resident. Only these are looked up in the file, so that a batch
        of memory that was in use costs the punches and nothing else.

    The set has merged adjacent ranges, so that each run is one system call. What
    lies outside the RAM, or what the host's kernel would not drop, is skipped;
    the file itself says afterwards which that is.
    """
    ours = hinted & ram.pages
    inside = PageMap(ours)
    unsure = inside & maybe_absent
    resident = (inside - unsure) | ram.resident(unsure)
    skipped: dict[pb.SkipReason.ValueType, RangeSet] = {}
    if outside := hinted - ours:
        skipped[pb.OUTSIDE_RAM] = outside
    try:
        ram.punch(ours if resident == inside else _met(ours, resident))
        left = NO_PAGES
    except OSError:
        left = ram.resident(inside)
        skipped[pb.HOST_ERROR] = left.ranges()
    return Outcome(reclaimed=resident - left, absent=inside - resident - left, skipped=skipped)


def _met(ranges: RangeSet, resident: PageMap) -> RangeSet:
    """Whole ranges in which anything is resident."""
    return RangeSet(one for one in ranges if resident.overlaps(one))

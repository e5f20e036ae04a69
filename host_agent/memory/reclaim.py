"""Reclaims a batch: drops the memory behind its pages. Reports which of its pages were resident,
which were absent already, and which were skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.fence import FenceClosed
from host_agent.memory.page_map import NO_PAGES, PageMap
from host_agent.memory.ram import GuestRam

Skips = Mapping["pb.SkipReason.ValueType", RangeSet]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result for hinted pages: each page is in exactly one of these sets.

    :ivar reclaimed: resident before, absent after.
    :ivar absent: absent before.
    :ivar skipped: not dropped, by reason.
    """

    reclaimed: PageMap = NO_PAGES
    absent: PageMap = NO_PAGES
    skipped: Skips = field(default_factory=dict)


def skip(hinted: RangeSet, reason: pb.SkipReason.ValueType) -> Outcome:
    """Return the outcome of a batch that is skipped as a whole."""
    return Outcome(skipped={reason: hinted})


def reclaim(ram: GuestRam, hinted: RangeSet, maybe_absent: PageMap, permit: int) -> Outcome:
    """Punch holes into those parts of `hinted` that are in the guest's RAM (I3). A range without a
    resident page is not punched; any other is punched as a whole.

    Three kinds of pages are skipped: pages outside the RAM, pages that the host's kernel did not
    drop, and pages that were not dropped yet when QEMU stopped the guest (I5).

    :param maybe_absent: pages that may be absent, from the ledger; every other page of the RAM
        counts as resident.
    :param permit: from `GuestRam.permit`, taken when the batch's turn came.
    :raises OSError: the kernel does not report what is resident. Nothing or a part was dropped.
    """
    ours = hinted & ram.pages
    inside = PageMap(ours)
    # Look only at pages that may be absent: a batch whose pages are all resident by the books costs
    # its punches and no look.
    unsure = inside & maybe_absent
    resident = (inside - unsure) | ram.resident(unsure)
    skipped: dict[pb.SkipReason.ValueType, RangeSet] = {}
    if outside := hinted - ours:
        skipped[pb.OUTSIDE_RAM] = outside
    left = NO_PAGES
    try:
        ram.punch(ours if resident == inside else _met(ours, resident), permit)
    except (OSError, FenceClosed) as error:
        # The error does not tell how far `punch` came, so look which pages are still resident.
        left = ram.resident(inside)
        reason = pb.GUEST_STOPPED if isinstance(error, FenceClosed) else pb.HOST_ERROR
        if left:
            skipped[reason] = left.ranges()
    return Outcome(reclaimed=resident - left, absent=inside - resident - left, skipped=skipped)


def _met(ranges: RangeSet, resident: PageMap) -> RangeSet:
    """Return those of `ranges` that have a page of `resident`, each as a whole."""
    return RangeSet(one for one in ranges if resident.overlaps(one))

"""When a host wants memory back: the `pressure` policy, as a pure function.

It suggests how much each guest may hint; whoever carries that out may refuse and
says why. `eager` and `cold` need no decision of the host: the guest follows them by
itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

OSCILLATION_SHARE = 0.5
"""A guest that used again more than this share of what it gave is left alone."""

SHORTEST_HOLD_S = 1.0
LONGEST_HOLD_S = 60.0


@dataclass(frozen=True, kw_only=True)
class HostView:
    """What the policy sees of the host.

    :ivar resident_bytes: of all guests together.
    :ivar budget_bytes: what they may use together.
    :ivar threshold: share of the budget above which memory is wanted back, 0 to 1.
    """

    now_s: float
    resident_bytes: int
    budget_bytes: int
    threshold: float

    @property
    def excess_bytes(self) -> int:
        """What should come back now; 0 without pressure."""
        return max(0, self.resident_bytes - int(self.budget_bytes * self.threshold))


@dataclass(frozen=True, kw_only=True)
class GuestView:
    """What the policy sees of one guest.

    :ivar can_give_bytes: free in the guest and resident here.
    :ivar chunk_bytes: what it hints is a multiple of that.
    :ivar reclaimed_total_bytes, refaulted_total_bytes: from its ledger.
    """

    name: str
    can_give_bytes: int
    chunk_bytes: int
    reclaimed_total_bytes: int
    refaulted_total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Back-off of one guest: what was seen of it last, and how long it is left alone.

    :ivar length_s: of the present or last hold; doubles with each oscillation.
    """

    until_s: float = 0.0
    length_s: float = 0.0
    reclaimed_total_bytes: int = 0
    refaulted_total_bytes: int = 0


class Reason(Enum):
    """Why a guest may hint nothing."""

    NO_PRESSURE = "no_pressure"
    NOTHING_TO_GIVE = "nothing_to_give"
    OSCILLATES = "oscillates"


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """How much one guest may hint until the next suggestion; 0 with the reason."""

    name: str
    allowance_bytes: int
    reason: Reason | None = None


def suggest(
    host: HostView, guests: Sequence[GuestView], holds: Mapping[str, Hold]
) -> tuple[list[Suggestion], dict[str, Hold]]:
    """Share the host's excess among its guests in proportion to what each can give.

    :param holds: back-off state as returned last time; empty at first.
    :returns: a suggestion for each guest, and the state for the next call. The
        allowances never sum to more than the excess, nor exceed what a guest can give. They
        are whole chunks: less than one nobody could hint.
    """
    new_holds = {g.name: _look(host.now_s, g, holds.get(g.name)) for g in guests}
    givers = {g.name: g.can_give_bytes for g in guests if new_holds[g.name].until_s <= host.now_s}
    total_bytes = sum(givers.values())
    wanted_bytes = min(host.excess_bytes, total_bytes)
    suggestions = []
    for guest in guests:
        share = givers.get(guest.name, 0) * wanted_bytes // total_bytes if total_bytes else 0
        share -= share % guest.chunk_bytes
        reason = None if share else _why_nothing(host, guest.name in givers)
        suggestions.append(Suggestion(name=guest.name, allowance_bytes=share, reason=reason))
    return suggestions, new_holds


def _why_nothing(host: HostView, may_give: bool) -> Reason:
    if not host.excess_bytes:
        return Reason.NO_PRESSURE
    if not may_give:
        return Reason.OSCILLATES
    return Reason.NOTHING_TO_GIVE


def _look(now_s: float, guest: GuestView, before: Hold | None) -> Hold:
    """Hold a guest longer each time that it takes back what it gave; forget in steps."""
    seen = Hold(
        reclaimed_total_bytes=guest.reclaimed_total_bytes,
        refaulted_total_bytes=guest.refaulted_total_bytes,
    )
    if before is None:
        return seen
    if now_s < before.until_s:
        return before
    gave_bytes = guest.reclaimed_total_bytes - before.reclaimed_total_bytes
    took_bytes = guest.refaulted_total_bytes - before.refaulted_total_bytes
    if took_bytes and took_bytes > OSCILLATION_SHARE * gave_bytes:
        length_s = min(max(SHORTEST_HOLD_S, 2 * before.length_s), LONGEST_HOLD_S)
        return replace(seen, until_s=now_s + length_s, length_s=length_s)
    # What a guest takes back comes later than what it gave: the length is remembered
    # over quiet looks, and halves with each.
    return replace(seen, length_s=before.length_s / 2 if gave_bytes else before.length_s)

"""What the host decides, as pure functions: under policy `pressure`, how much memory each guest may
hint now; under policy `adaptive`, for how long it may hold memory back.

The other policies, `eager` and `cold`, need no decision of the host: the guest follows them by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

# A guest oscillates if, from one call of `suggest` to the next, it takes back more than this share
# of what it gave. Then it is held: it may hint nothing for a while.
OSCILLATION_SHARE = 0.5

SHORTEST_HOLD_S = 1.0
LONGEST_HOLD_S = 60.0


@dataclass(frozen=True, kw_only=True)
class HostView:
    """The facts about the host that the policy uses.

    :ivar now_s: present time of the monotonic clock.
    :ivar resident_bytes: resident memory of all guests together.
    :ivar budget_bytes: how much memory all guests may use together.
    :ivar threshold: share of the budget above which memory is wanted back, 0 to 1.
    """

    now_s: float
    resident_bytes: int
    budget_bytes: int
    threshold: float

    @property
    def excess_bytes(self) -> int:
        """How much is resident above the threshold, and should come back; 0 if nothing is."""
        return max(0, self.resident_bytes - int(self.budget_bytes * self.threshold))


@dataclass(frozen=True, kw_only=True)
class GuestView:
    """The facts about one guest that the policy uses.

    :ivar can_give_bytes: memory that is free in the guest and resident on the host.
    :ivar chunk_bytes: size of the guest's chunks; it hints whole chunks only.
    :ivar reclaimed_total_bytes, refaulted_total_bytes: from the guest's ledger.
    """

    name: str
    can_give_bytes: int
    chunk_bytes: int
    reclaimed_total_bytes: int
    refaulted_total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Back-off of one guest: during a hold, the guest may hint nothing.

    :ivar until_s: when the hold ends, exclusive; a time in the past if there is no hold.
    :ivar length_s: during a hold, its length. The next hold is twice as long, within
        SHORTEST_HOLD_S and LONGEST_HOLD_S. Each call of `suggest` that sees that the guest
        gave memory without oscillating halves this value.
    :ivar reclaimed_total_bytes, refaulted_total_bytes: the guest's totals at the last call of
        `suggest` that was not during a hold.
    """

    until_s: float = 0.0
    length_s: float = 0.0
    reclaimed_total_bytes: int = 0
    refaulted_total_bytes: int = 0


_PATIENCE_STEPS = 8
"""How many steps the patience has from 0 to 1: guests are told only when it changes by a step."""


def patience(host: HostView, before: float) -> float:
    """Return for which share of their break-even times guests may hold memory back: all up to the
    threshold, none when the budget is used up, and in between the less the fuller the host is.

    One share for all guests: so what goes first is what its guest is the least likely to use again
    soon (`guest_agent.holding_back`), whichever guest has it.

    :param before: the share until now. The share returns to 1 at once when the host is not above
        the threshold. Otherwise it grows to a higher step (of 1/8) only when there is room
        for more than half of that step: else the memory that is then held back would lower the
        share again at once.
    """
    room_bytes = int(host.budget_bytes * (1 - host.threshold))
    left = 1 - host.excess_bytes / room_bytes if room_bytes else float(not host.excess_bytes)
    left_steps = max(0.0, left) * _PATIENCE_STEPS
    steps, steps_before = math.ceil(left_steps), round(before * _PATIENCE_STEPS)
    if steps > steps_before and left < 1:
        steps = max(steps_before, math.ceil(left_steps - 0.5))
    return steps / _PATIENCE_STEPS


class Reason(Enum):
    """Why a guest may hint nothing."""

    NO_PRESSURE = "no_pressure"
    NOTHING_TO_GIVE = "nothing_to_give"
    OSCILLATES = "oscillates"


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """How much one guest may hint until the next suggestion; if nothing, `reason` is set."""

    name: str
    allowance_bytes: int
    reason: Reason | None = None


def suggest(
    host: HostView, guests: Sequence[GuestView], holds: Mapping[str, Hold]
) -> tuple[list[Suggestion], dict[str, Hold]]:
    """Share the host's excess among guests in proportion to what each can give; held guests get 0.

    :param holds: back-off state as returned last time; empty at first.
    :returns: a suggestion for each guest, and the state for the next call. The sum of all
        allowances is at most the excess. Each allowance is a number of whole chunks, and at most
        what its guest can give.
    """
    new_holds = {g.name: _next_hold(host.now_s, g, holds.get(g.name)) for g in guests}
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


def _next_hold(now_s: float, guest: GuestView, before: Hold | None) -> Hold:
    """Return the guest's back-off now: `before` while that hold lasts; a new hold if the guest has
    oscillated since `before`; else a `Hold` that is over, with the guest's present totals."""
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
    # No oscillation since the last call. But a guest may take back later what it gave meanwhile: so
    # do not set the length to 0, but halve it, and only if the guest gave memory.
    return replace(seen, length_s=before.length_s / 2 if gave_bytes else before.length_s)

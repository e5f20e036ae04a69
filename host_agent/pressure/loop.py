"""Carries out policy `pressure`: a loop that calls `policy.suggest` and sends allowances."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hintfleet.settings import DEFAULT_PRESSURE_PERCENT, Policy
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.guest import Guest
from host_agent.pressure.policy import GuestView, Hold, HostView, Suggestion, suggest
from host_agent.waking import next_wake_s, sleep_until

PERIOD_S = 0.5


class Pressure:
    """Reads the books of all guests, and sends allowances to those under policy `pressure`."""

    def __init__(self, guests: Callable[[], Sequence[Guest]], budget_bytes: int) -> None:
        """:param budget_bytes: how much memory all guests of this host may use together."""
        self._guests = guests
        self._budget_bytes = budget_bytes
        self._holds: dict[str, Hold] = {}
        self._any_under_policy = False

    async def run(self) -> None:
        """Call `act` every PERIOD_S until cancelled; every second while no guest has the policy."""
        while True:
            now_s = time.monotonic()
            await sleep_until(now_s + PERIOD_S if self._any_under_policy else next_wake_s(now_s))
            self.act()

    def act(self) -> None:
        """Compute the present allowance of each running guest under the policy, and send it; 0 is
        not sent twice in succession."""
        guests = {g.name: g for g in self._guests() if g.running is not None}
        ruled = [g for g in guests.values() if _is_under_policy(g)]
        self._any_under_policy = bool(ruled)
        if not ruled:
            self._holds = {}
            return
        # The books of all running guests, not only of those under the policy: all share the budget.
        books = {name: guest.memory.books_now() for name, guest in guests.items()}
        percent = min(g.spec.hinting.pressure_percent or DEFAULT_PRESSURE_PERCENT for g in ruled)
        host = HostView(
            now_s=time.monotonic(),
            resident_bytes=sum(ledger.resident_bytes for ledger in books.values()),
            budget_bytes=self._budget_bytes,
            threshold=percent / 100,
        )
        views = [_view(guest, books[guest.name]) for guest in ruled]
        suggestions, self._holds = suggest(host, views, self._holds)
        for suggestion in suggestions:
            _carry_out(guests[suggestion.name], suggestion)


def _is_under_policy(guest: Guest) -> bool:
    return guest.spec.method == host_pb2.HINTING and guest.spec.hinting.policy == Policy.PRESSURE


def _view(guest: Guest, ledger: host_pb2.Ledger) -> GuestView:
    absent_bytes = ledger.reclaimed_now_bytes + ledger.untouched_bytes
    return GuestView(
        name=guest.name,
        # Absent memory is free in the guest; all other free memory of the guest is resident.
        can_give_bytes=max(0, guest.sessions.telemetry.free_bytes - absent_bytes),
        chunk_bytes=PAGE_BYTES << guest.sessions.chunk_order,
        reclaimed_total_bytes=ledger.reclaimed_total_bytes,
        refaulted_total_bytes=ledger.refaulted_total_bytes,
    )


def _carry_out(guest: Guest, suggestion: Suggestion) -> None:
    guest.sessions.refusal = suggestion.reason.value if suggestion.reason else ""
    if suggestion.reason is not None:
        guest.sessions.refusals[suggestion.reason.value] += 1
    guest.sessions.tell_allowance(suggestion.allowance_bytes)

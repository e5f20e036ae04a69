"""Carries out what the host decides in policies `pressure` and `adaptive`: a loop that sends
allowances and patience."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hintfleet.settings import DEFAULT_POLICY, DEFAULT_PRESSURE_PERCENT, Policy
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.guest import Guest, has_memory
from host_agent.pressure.policy import GuestView, Hold, HostView, Suggestion, patience, suggest
from host_agent.waking import next_wake_s, sleep_until

PERIOD_S = 0.5


class Pressure:
    """Reads the books of all guests; by them, gives guests under policy `pressure` an allowance,
    and tells those under `adaptive` how long to hold memory back (`patience`)."""

    def __init__(self, guests: Callable[[], Sequence[Guest]], budget_bytes: int) -> None:
        """:param budget_bytes: how much memory all guests of this host may use together."""
        self._guests = guests
        self._budget_bytes = budget_bytes
        self._holds: dict[str, Hold] = {}
        self._patience = 1.0
        self._any_allowed = False

    async def run(self) -> None:
        """Call `act` every PERIOD_S until cancelled; every second while no guest is under
        `pressure`."""
        while True:
            now_s = time.monotonic()
            await sleep_until(now_s + PERIOD_S if self._any_allowed else next_wake_s(now_s))
            self.act()

    def act(self) -> None:
        """Send each running guest under policy `pressure` its present allowance (0 is not sent
        twice in succession), and each under `adaptive` its patience, if that has changed."""
        guests = {g.name: g for g in self._guests() if has_memory(g)}
        allowed = _under(Policy.PRESSURE, guests.values())
        adaptive = _under(Policy.ADAPTIVE, guests.values())
        self._any_allowed = bool(allowed)
        if not allowed:
            self._holds = {}
        if not (allowed or adaptive):
            return
        # The books of all running guests, not only of those under these two policies: all guests
        # share the budget.
        books = {name: guest.memory.books_now() for name, guest in guests.items()}
        percents = (g.spec.hinting.pressure_percent or DEFAULT_PRESSURE_PERCENT for g in allowed)
        host = HostView(
            now_s=time.monotonic(),
            resident_bytes=sum(ledger.resident_bytes for ledger in books.values()),
            budget_bytes=self._budget_bytes,
            threshold=min(percents, default=DEFAULT_PRESSURE_PERCENT) / 100,
        )
        usual = replace(host, threshold=DEFAULT_PRESSURE_PERCENT / 100)
        self._patience = patience(usual, self._patience)
        for guest in adaptive:
            guest.sessions.policy.update(patience=self._patience)
        if allowed:
            views = [view_of(guest, books[guest.name]) for guest in allowed]
            suggestions, self._holds = suggest(host, views, self._holds)
            for suggestion in suggestions:
                _carry_out(guests[suggestion.name], suggestion)


def _under(policy: Policy, guests: Iterable[Guest]) -> list[Guest]:
    return [
        guest
        for guest in guests
        if guest.spec.method == host_pb2.HINTING
        and (guest.spec.hinting.policy or DEFAULT_POLICY) == policy
    ]


def view_of(guest: Guest, ledger: host_pb2.Ledger) -> GuestView:
    absent_bytes = ledger.reclaimed_now_bytes + ledger.untouched_bytes
    return GuestView(
        name=guest.name,
        # Absent memory is free in the guest; all other free memory of the guest is resident. A
        # guest may lie about what is free, but cannot give more than is resident.
        can_give_bytes=max(
            0, min(ledger.resident_bytes, guest.sessions.telemetry.free_bytes - absent_bytes)
        ),
        chunk_bytes=PAGE_BYTES << guest.sessions.chunk_order,
        reclaimed_total_bytes=ledger.reclaimed_total_bytes,
        refaulted_total_bytes=ledger.refaulted_total_bytes,
    )


def _carry_out(guest: Guest, suggestion: Suggestion) -> None:
    guest.sessions.refusal = suggestion.reason.value if suggestion.reason else ""
    if suggestion.reason is not None:
        guest.sessions.refusals[suggestion.reason.value] += 1
    guest.sessions.policy.update(allowance_bytes=suggestion.allowance_bytes)

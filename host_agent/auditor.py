"""Has every guest's books audited when that is due: one task for all guests, which sleeps until
the first of them is to be checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from host_agent.cpu_meter import CpuMeter
from host_agent.guest import Guest
from host_agent.waking import next_wake_s, sleep_until

_SHORTEST_S = 0.02
_AT_A_TIME = 64


async def audit_when_due(guests: Callable[[], Sequence[Guest]], observing: CpuMeter) -> None:
    """Run until cancelled.

    :param observing: where the checks are entered.
    """
    while True:
        now_s = time.monotonic()
        everyone = guests()
        for first in range(0, len(everyone), _AT_A_TIME):
            with observing.running():
                for guest in everyone[first : first + _AT_A_TIME]:
                    if guest.audits.next_check_s <= now_s:
                        guest.audits.check(now_s)
            await asyncio.sleep(0)  # acks do not wait for all of them
        # No later: a guest that is new has never been checked.
        next_s = min((next_wake_s(now_s), *(guest.audits.next_check_s for guest in everyone)))
        await sleep_until(max(next_s, now_s + _SHORTEST_S))

"""Carries out the balloon's rule on one guest, and sees whether a peer can work at all.

A guest whose driver says nothing keeps all its memory. That is no saving of zero: the method
was not tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hintfleet.errors import Refused
from host_agent.guests.balloon import (
    PERIOD_S,
    SILENT_AFTER_S,
    Balloon,
    Reporting,
    Rest,
    Rule,
    Silence,
)
from host_agent.waking import next_wake_s, sleep_until


async def follow(
    balloon: Balloon, rule: Rule, works: Callable[[], None], stirred: Callable[[], bool]
) -> None:
    """Look once per period, or less often at rest, and move the target, until cancelled.

    :param works: called each time that the guest has said what the rule needs.
    :param stirred: whether the guest's resident memory has moved since it was last called.
    :raises hintfleet.errors.GuestLost: the guest is gone.
    :raises hintfleet.errors.Refused: the guest is silent, or the hypervisor would not do it.
    """
    moved_at_s = 0.0
    silence, rest = Silence(time.monotonic()), Rest()
    while True:
        await sleep_until(next_wake_s(time.monotonic()))
        if not rest.over(stirred()):
            continue
        stats = await asyncio.to_thread(balloon.stats)
        if problem := silence.look(stats, time.monotonic()):
            raise Refused(problem)
        # What the guest said before the last move does not fit the balloon's size now.
        if stats.unused_bytes is None or stats.said_at_s <= moved_at_s:
            continue
        works()
        target_bytes = rule.next_target(stats)
        if target_bytes is not None:
            await asyncio.to_thread(balloon.set_target, target_bytes)
            moved_at_s = time.time()


async def wait_reporting(reporting: Reporting) -> None:
    """Return once the guest reports, as far as that can be known.

    :raises hintfleet.errors.GuestLost: the guest is gone.
    :raises hintfleet.errors.Refused: it does not.
    """
    deadline_s = time.monotonic() + SILENT_AFTER_S
    while problem := await asyncio.to_thread(reporting.problem):
        if time.monotonic() > deadline_s:
            raise Refused(problem)
        await asyncio.sleep(PERIOD_S)

"""Carries out the balloon's rule on one guest, and finds out whether a peer can work at all.

A guest whose balloon driver is missing, or does not report free pages, keeps all its memory. An
experiment must not report that as a saving of zero, because the method was not tried. So both
functions here raise Refused, and the guest counts as lost.
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
    PollSchedule,
    Reporting,
    Rule,
    Silence,
)
from host_agent.waking import next_wake_s, sleep_until


async def follow(
    balloon: Balloon, rule: Rule, works: Callable[[], None], has_moved: Callable[[], bool]
) -> None:
    """Read the statistics once per period (at rest less often) and move the target, until
    cancelled.

    :param works: called after each read that had what the rule needs.
    :param has_moved: returns whether the guest's resident memory has moved by 1 MiB or more since
        it last returned true.
    :raises hintfleet.errors.GuestLost: the guest is gone.
    :raises hintfleet.errors.Refused: the guest has sent no new usable statistics for
        SILENT_AFTER_S, or the hypervisor failed.
    """
    moved_at_s = 0.0
    silence, schedule = Silence(time.monotonic()), PollSchedule()
    while True:
        await sleep_until(next_wake_s(time.monotonic()))
        if not schedule.is_due(has_moved()):
            continue
        stats = await asyncio.to_thread(balloon.stats)
        if problem := silence.problem(stats, time.monotonic()):
            raise Refused(problem)
        # `size_bytes` is of now, `unused_bytes` of the last update: if the target has moved since
        # that update, their difference is not what the guest uses. So wait for the next update.
        # If the clock was set back since the move, count the move as of now. An update with a time
        # in the future is from before the clock was set back, so it is not used.
        now_s = time.time()
        moved_at_s = min(moved_at_s, now_s)
        if stats.unused_bytes is None or not moved_at_s < stats.last_update_s <= now_s:
            continue
        works()
        target_bytes = rule.next_target(stats)
        if target_bytes is not None:
            await asyncio.to_thread(balloon.set_target, target_bytes)
            moved_at_s = time.time()


async def wait_reporting(reporting: Reporting) -> None:
    """Return when the guest reports free pages, or when it cannot be found out whether it does.

    :raises hintfleet.errors.GuestLost: the guest is gone.
    :raises hintfleet.errors.Refused: it does not report within SILENT_AFTER_S; says why.
    """
    deadline_s = time.monotonic() + SILENT_AFTER_S
    while problem := await asyncio.to_thread(reporting.problem):
        if time.monotonic() > deadline_s:
            raise Refused(problem)
        await asyncio.sleep(PERIOD_S)

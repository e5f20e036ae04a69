"""Carries out the balloon's rule on one guest."""

from __future__ import annotations

import asyncio
import time

from host_agent.balloon import PERIOD_S, Balloon, Rule


async def follow(balloon: Balloon, rule: Rule) -> None:
    """Look once per period and move the target, until cancelled.

    :raises hintfleet.errors.GuestLost: the guest is gone.
    :raises hintfleet.errors.Refused: the hypervisor would not do it.
    """
    moved_at_s = 0.0
    while True:
        await asyncio.sleep(PERIOD_S)
        stats = await asyncio.to_thread(balloon.stats)
        # What the guest said before the last move does not fit the balloon's size now.
        if stats is None or stats.said_at_s <= moved_at_s:
            continue
        target_bytes = rule.next_target(stats)
        if target_bytes is not None:
            await asyncio.to_thread(balloon.set_target, target_bytes)
            moved_at_s = time.time()

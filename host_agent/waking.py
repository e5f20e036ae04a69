"""When tasks that do little wake: together, for waking costs more than what they do."""

from __future__ import annotations

import asyncio
import math
import time

WAKE_S = 1.0


def next_wake_s(now_s: float) -> float:
    """The next whole second of the monotonic clock: one moment for all that can wait for it."""
    return math.floor(now_s + WAKE_S)


async def sleep_until(at_s: float) -> None:
    """Sleep until a time of the monotonic clock, which may be over."""
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))

"""Common wake times for tasks that do little: waking the process costs more than their work."""

from __future__ import annotations

import asyncio
import math
import time

WAKE_S = 1.0


def next_wake_s(now_s: float) -> float:
    """Return the next whole second of the monotonic clock: the same wake time for all tasks."""
    return math.floor(now_s + WAKE_S)


async def sleep_until(at_s: float) -> None:
    """Sleep until a time of the monotonic clock; return at once if it is past."""
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))

"""Limits the streams that have not sent their guest's identity yet.

No guest can be charged for them, so their number is limited, and how long one may wait. When the
limit is reached, the oldest is ended: an honest guest sends its first message with its stream, so
a stream that has waited long is probably not an honest guest's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PendingStreams:
    """At most `places` streams at a time, each for at most `timeout_s`."""

    def __init__(self, places: int, timeout_s: float) -> None:
        self._places = places
        self._timeout_s = timeout_s
        self._waiting: dict[asyncio.Timeout, None] = {}

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place while the block runs.

        :raises TimeoutError: in the block, after `timeout_s`, or when another stream needs the
            place.
        """
        if len(self._waiting) >= self._places:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            # Timeout.reschedule raises RuntimeError if it is expiring (Lib/asyncio/timeouts.py).
            with contextlib.suppress(RuntimeError):
                oldest.reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(self._timeout_s) as timeout:
            self._waiting[timeout] = None
            try:
                yield
            finally:
                self._waiting.pop(timeout, None)

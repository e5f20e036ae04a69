"""Limits the streams that have not sent their guest's identity yet.

Nobody knows which guest opened such a stream, so no guest's own limits can count it. Instead, the
number of all such streams is limited, and how long each may wait. When the limit is reached, the
oldest is ended: an honest guest sends its first message as soon as it opens a stream, so a stream
that has waited long is probably not an honest guest's. A stream that is to be refused also takes a
place, during the pause before its refusal (guest_service.py).
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

        :raises TimeoutError: the block was cancelled, after `timeout_s` or because another stream
            needed the place.
        """
        if len(self._waiting) >= self._places:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            # Timeout.reschedule raises RuntimeError if the timeout has just expired
            # (Lib/asyncio/timeouts.py).
            with contextlib.suppress(RuntimeError):
                oldest.reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(self._timeout_s) as timeout:
            self._waiting[timeout] = None
            try:
                yield
            finally:
                self._waiting.pop(timeout, None)

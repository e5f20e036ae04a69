"""Where streams wait that have not said yet whose they are.

Nobody can be held to account for them, so there is a bound on how many there are, and on
how long one waits. When it is full the oldest must go: an honest guest's first message
comes with its stream, so those that have waited are not honest guests' mostly.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PendingStreams:
    """Room for so many streams, each for so long."""

    def __init__(self, places: int, longest_s: float) -> None:
        self._places = places
        self._longest_s = longest_s
        self._waiting: dict[asyncio.Timeout, None] = {}

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place while the block runs.

        :raises TimeoutError: in the block, after the longest time, or when the place is
            needed for another.
        """
        if len(self._waiting) >= self._places:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            with contextlib.suppress(RuntimeError):  # its time is just up
                oldest.reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(self._longest_s) as timeout:
            self._waiting[timeout] = None
            try:
                yield
            finally:
                self._waiting.pop(timeout, None)

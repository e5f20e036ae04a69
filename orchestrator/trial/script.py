"""What the scripts of a host's part of a trial have in common: a queue of records, filled by a
task.

runner.py has the script for guests that are made for the trial, block_runner.py the one for guests
that are there already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Protocol

from hintfleet.errors import HintfleetError
from orchestrator.trial.records import Event, HostSamples


class Script(Protocol):
    """One host's part of a trial."""

    records: asyncio.Queue[Event | HostSamples | None]

    async def run(self) -> None:
        """Put all records into the queue, the last one a HostDone, and None after it, also after an
        error."""


async def records_of(script: Script) -> AsyncIterator[Event | HostSamples]:
    """Run a script and yield its records. If the iterator is closed early, the script is cancelled,
    and has ended when this returns.

    :raises StableError: that of the script.
    """
    running = asyncio.create_task(script.run())
    try:
        while (record := await script.records.get()) is not None:
            yield record
        await running
    finally:
        # Wait until the cancelled task has closed its watch and ended its pauses: as long as they
        # are open, the host agent keeps guests, or lets them hint nothing.
        await cancelled(running)


async def cancelled(job: asyncio.Task[Any]) -> None:
    """Cancel a task if it has not ended, and wait for its end; drop its HintfleetError."""
    job.cancel()
    with suppress(asyncio.CancelledError, HintfleetError):
        await job


def now_us() -> int:
    """Return the time in microseconds since 1970."""
    return time.time_ns() // 1000

"""What the scripts of a host's part of a trial have in common: a task that puts records into a
queue. The last record says how the part ended.

runner.py has the script for guests that are made for the trial, block_runner.py the one for guests
that are there already.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from hintfleet.errors import HintfleetError
from hintfleet.v1 import host_pb2
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import (
    Event,
    HostDone,
    HostSamples,
    HypervisorFound,
    PhaseStarted,
)


class Script(ABC):
    """One host's part of a trial."""

    def __init__(self, task: HostTask) -> None:
        self.records: asyncio.Queue[Event | HostSamples | None] = asyncio.Queue()
        self._task = task
        self._hypervisors: set[str] = set()

    async def run(self) -> None:
        """Put all records into the queue, the last one a HostDone, and None after it; after an
        error, None without a HostDone."""
        try:
            undecided, lost = await self._outcome()
            self._post(
                HostDone(
                    host=self._task.host,
                    trial_id=self._task.trial.trial_id,
                    at_unix_us=now_us(),
                    undecided=undecided,
                    lost=lost,
                )
            )
        finally:
            # Also after an error: without the None, the reader of the queue would wait for ever.
            self.records.put_nowait(None)

    @abstractmethod
    async def _outcome(self) -> tuple[str, bool]:
        """Do the host's part, and post its records.

        :returns: why it is undecided, or ""; and whether the host agent was lost.
        :raises StableError: the host cannot do it.
        """

    def _announce(self, title: str, hold_s: float, guest: str = "") -> None:
        self._post(
            PhaseStarted(
                host=self._task.host,
                trial_id=self._task.trial.trial_id,
                at_unix_us=now_us(),
                title=title,
                hold_s=hold_s,
                guest=guest,
            )
        )

    def _note_hypervisor(self, guest: host_pb2.Guest) -> None:
        """Post the guest's hypervisor, unless it has none or it was posted before."""
        if guest.hypervisor and guest.hypervisor not in self._hypervisors:
            self._hypervisors.add(guest.hypervisor)
            self._post(
                HypervisorFound(
                    host=self._task.host,
                    trial_id=self._task.trial.trial_id,
                    at_unix_us=now_us(),
                    hypervisor=guest.hypervisor,
                )
            )

    def _post(self, record: Event | HostSamples) -> None:
        self.records.put_nowait(record)


async def records_of(script: Script) -> AsyncIterator[Event | HostSamples]:
    """Run a script and yield its records. If the iterator is closed early, the script is cancelled
    first, and its end is waited for.

    :raises StableError: that of the script.
    """
    running = asyncio.create_task(script.run())
    try:
        while (record := await script.records.get()) is not None:
            yield record
        await running
    finally:
        # Wait until the cancelled task has closed its watch and ended its pauses: while the watch
        # is open, the host agent keeps the guests; while a pause lasts, a guest hints nothing.
        await cancelled(running)


async def cancelled(*jobs: asyncio.Task[Any]) -> None:
    """Cancel the tasks that have not ended, one after the other, and wait for the end of each; drop
    their HintfleetErrors.

    :raises CancelledError: the caller was cancelled meanwhile; all the same, all tasks have ended.
    """
    before = _cancellations()
    for job in jobs:
        job.cancel()
        with suppress(asyncio.CancelledError, HintfleetError):
            await job
    # The error that was dropped may have been that of the caller, not that of the task.
    if _cancellations() > before:
        raise asyncio.CancelledError


def _cancellations() -> int:
    """Return how often this task was cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def now_us() -> int:
    """Return the time in microseconds since 1970."""
    return time.time_ns() // 1000

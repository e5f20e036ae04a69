"""Runs the hosts of one actor side by side, and merges their records into one stream of batches.

Does not import Ray: ray_actors.py wraps a `HostGroup` into an actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hintfleet.system.owned_folders import OwnedFolder
from orchestrator.machine import runtime_dirs
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.host_session import HostSession
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import Event, HostSamples, Record, Samples, columns_of
from orchestrator.trial.script import cancelled

_Item = TypeVar("_Item")

# Each batch becomes an object in Ray, and each object has a cost.
_BATCH_PERIOD_S = 0.25
# Hundreds of host agents that start at once on a small machine would exceed their deadline. So each
# actor opens few at once, and the deadline of each begins when it is its turn.
_OPENED_AT_ONCE = 16
# How long an `open` or `run` that is cut off may take to end. Then its connections are closed.
_END_S = 6.0


class HostGroup:
    """The sessions of the hosts that one actor controls."""

    def __init__(self, places: Sequence[HostPlace], folder: Path | None) -> None:
        """:param folder: for the files of logical hosts; None: `open` makes one if needed."""
        self._places = places
        self._folder = folder
        self._own_folder: OwnedFolder | None = None
        self._sessions: Mapping[str, HostSession] = {}
        self._working: set[asyncio.Task[None]] = set()  # `open` and `run`, while not over
        self._turns = asyncio.Semaphore(_OPENED_AT_ONCE)

    async def open(self) -> None:
        """Reach all hosts, up to 16 at a time, and check that they can run the guests.

        After a failure, hosts that were reached stay open until `close`.

        :raises HintfleetError: a host cannot be reached or used.
        """
        if self._folder is None and any(place.logical for place in self._places):
            self._own_folder = runtime_dirs().make()
            self._folder = self._own_folder.path
        folder = self._folder or Path()  # not used for hosts that run already
        self._sessions = {
            place.name: HostSession(place, folder / place.name, self._turns)
            for place in self._places
        }
        await self._started(_on_all(HostSession.open, self._sessions.values()))

    async def run(self, tasks: Sequence[HostTask]) -> AsyncGenerator[list[Record], None]:
        """Run the hosts' parts of one trial at once; yield batches of their records.

        A batch comes every 0.25 s while there are records. In a batch, Samples come first.

        :raises HintfleetError: a host cannot run the trial. The parts of the others are cut off.
        """
        records: list[Event | HostSamples] = []

        async def run_one(task: HostTask) -> None:
            async for record in self._sessions[task.host].run(task):
                records.append(record)

        parts = self._started(_on_all(run_one, tasks))
        try:
            ended = False
            while not ended:
                await asyncio.wait((parts,), timeout=_BATCH_PERIOD_S)
                # `ended` is read before the records are taken: during `yield`, more records may
                # come and the parts may end; then the loop must go on.
                ended = parts.done()
                batch = _merged(tasks[0].trial.trial_id, records)
                records.clear()
                if batch:
                    yield batch
            await parts
        finally:
            await cancelled(parts)

    async def close(self) -> None:
        """Close all sessions, so that host agents end the guests of a trial; stop logical hosts. An
        `open` or `run` that is not over is cancelled first, and waited for, _END_S at most: it
        could start another host afterwards.

        May be called twice. Raises the first error of a session after all are closed.
        """
        working = list(self._working)
        for task in working:
            task.cancel()
        if working:  # so that scripts can end the pauses of guests, over connections that are open
            await asyncio.wait(working, timeout=_END_S)
        closing = (session.close() for session in self._sessions.values())
        ended = await asyncio.gather(*closing, return_exceptions=True)
        await asyncio.gather(*working, return_exceptions=True)
        if self._own_folder is not None:
            self._own_folder.remove()
        for error in filter(None, ended):
            raise error

    def _started(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task


async def _on_all(
    action: Callable[[_Item], Coroutine[None, None, None]], items: Iterable[_Item]
) -> None:
    """Call `action` for all items at once; on the first error, cancel the other calls, wait for
    their ends, and raise it."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(action(item))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _merged(trial_id: str, records: Sequence[Event | HostSamples]) -> list[Record]:
    """Return the events among the records, after one Samples with all samples, if there are any."""
    sets = [record for record in records if isinstance(record, HostSamples)]
    samples = Samples(trial_id=trial_id, columns=columns_of(sets))
    events = [record for record in records if not isinstance(record, HostSamples)]
    return [samples, *events] if samples.row_count else [*events]

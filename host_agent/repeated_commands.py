"""Commands of the control API that are asked for again: carried out once, answered each time.

Their ids are those of the orchestrator (trial/runner.py). A step that reached the guest is
answered from memory there as well, whichever host agent asks (guest_agent/workload_client.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from hintfleet.errors import GuestLost
from hintfleet.v1 import host_pb2

_T = TypeVar("_T")


class RepeatedCommands:
    """The commands of all trials, with the answers that they were given."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str, int], asyncio.Task[object]] = {}

    async def once(self, command: host_pb2.CommandId, do: Callable[[], Awaitable[_T]]) -> _T:
        """Carry out a command and return its answer; a retry (same id) gets the same answer.

        A command without an id is carried out each time. A command that failed is carried out
        again by a retry, unless its guest was lost. That is safe: a workload answers a step that
        it has done already from memory.
        """
        if not command.sequence:
            return await do()
        key = (command.run_id, command.trial_id, command.sequence)
        task = self._answers.get(key)
        if task is None:
            task = self._answers[key] = asyncio.ensure_future(_as_coroutine(do))
            # The caller may be gone when the command fails. `exception` marks the error as
            # retrieved, else asyncio logs it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return cast(_T, await asyncio.shield(task))
        except GuestLost:
            raise
        except Exception:
            if self._answers.get(key) is task:
                del self._answers[key]
            raise

    def forget(self, trial_id: str) -> None:
        """Drop the answers of a trial that has ended."""
        for key in [key for key in self._answers if key[1] == trial_id]:
            del self._answers[key]


async def _as_coroutine(do: Callable[[], Awaitable[object]]) -> object:
    return await do()

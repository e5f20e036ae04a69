"""Carries out a command of the control API once, even if the client sends it again, and answers
it each time. Only a command that has no sequence number, or that has failed with another error than
GuestLost, is carried out again.

The client chooses the commands' ids (orchestrator/trial/runner.py; for commands of no trial,
orchestrator/commands/domains.py). The guest remembers its last answers as well: a step that it has
done is not done twice, even if another host agent sends the step again
(guest_agent/workload_client.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar, cast

from hintfleet.errors import GuestLost
from hintfleet.v1 import host_pb2

_T = TypeVar("_T")
_Key = tuple[str, str, int]

# No end of a trial drops the answers to commands of no trial (AttachGuest, DetachGuest), so only
# those to the last ones are kept. Operators send few, and a client retries within minutes.
ANSWERS_WITHOUT_TRIAL = 100


class RepeatedCommands:
    """The commands by id, with their answers: all of each trial, and the last ones of no trial."""

    def __init__(self) -> None:
        self._answers: dict[_Key, asyncio.Task[object]] = {}

    async def once(self, command: host_pb2.CommandId, do: Callable[[], Awaitable[_T]]) -> _T:
        """Carry out a command and return its answer; a retry (same id) gets the same answer.

        A command without a sequence number is carried out each time. If a command fails, all
        callers that wait for it get the error, and a later retry carries it out again. This is
        safe: if the guest's workload has done a step already, it answers from memory. Only
        GuestLost stays the answer to all retries.
        """
        if not command.sequence:
            return await do()
        key = (command.run_id, command.trial_id, command.sequence)
        task = self._answers.get(key)
        if task is None:
            task = self._answers[key] = asyncio.ensure_future(_as_coroutine(do))
            task.add_done_callback(partial(self._drop_failed, key))
            self._drop_oldest_without_trial()
        return cast(_T, await asyncio.shield(task))

    def _drop_failed(self, key: _Key, task: asyncio.Task[object]) -> None:
        # Not in `once`: the caller may be gone when the command fails. `exception` marks the error
        # as retrieved, else asyncio logs it.
        failed = task.cancelled() or not isinstance(task.exception(), GuestLost | None)
        if failed and self._answers.get(key) is task:
            del self._answers[key]

    def _drop_oldest_without_trial(self) -> None:
        without = [key for key in self._answers if not key[1]]
        for key in without[:-ANSWERS_WITHOUT_TRIAL]:
            del self._answers[key]

    def forget(self, trial_id: str) -> None:
        """Drop the answers of a trial that has ended."""
        for key in [key for key in self._answers if key[1] == trial_id]:
            del self._answers[key]


async def _as_coroutine(do: Callable[[], Awaitable[object]]) -> object:
    return await do()

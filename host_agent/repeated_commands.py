"""Carries out a command of the control API once: if the client sends the command again, even while
it runs, the client gets the same answer. A command that has no sequence number, that has failed
with another error than GuestLost, or whose answer is not kept any more, is carried out again.

The client chooses the commands' ids (orchestrator/trial/runner.py; for commands of no trial,
orchestrator/commands/domains.py). The guest remembers its last answers as well: a step that it has
done is not done twice, even if another host agent sends the step again
(guest_agent/workload/client.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar, cast

from hintfleet.errors import GuestLost
from hintfleet.v1 import host_pb2

_T = TypeVar("_T")
_Key = tuple[str, int]
"""A command's run and sequence number."""
_Answers = dict[_Key, asyncio.Task[object]]

# Answers to a trial's commands are dropped at its end. Commands of no trial (AttachGuest,
# DetachGuest) have no such end, so the answers to only so many of them are kept. Operators send
# few, and a client retries within minutes.
ANSWERS_WITHOUT_TRIAL = 100


class RepeatedCommands:
    """The answers to commands, by the commands' ids: to all commands of trials that have not ended,
    and to the latest ANSWERS_WITHOUT_TRIAL commands of no trial."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answers] = {}
        """By trial; the commands of no trial are under ""."""

    async def once(self, command: host_pb2.CommandId, do: Callable[[], Awaitable[_T]]) -> _T:
        """Carry out a command and return its answer; a retry (same id) gets the same answer.

        A command without a sequence number is carried out each time. If a command fails, all
        callers that wait for it get the error, and a later retry carries it out again. This is
        safe: if the guest's workload has done a step already, it answers from memory. Only
        GuestLost stays the answer to all retries.
        """
        if not command.sequence:
            return await do()
        answers = self._answers.setdefault(command.trial_id, {})
        key = (command.run_id, command.sequence)
        task = answers.get(key)
        if task is None:
            task = answers[key] = asyncio.ensure_future(_as_coroutine(do))
            task.add_done_callback(partial(self._drop_failed, command.trial_id, key))
            if not command.trial_id and len(answers) > ANSWERS_WITHOUT_TRIAL:
                del answers[next(iter(answers))]  # the oldest
        return cast(_T, await asyncio.shield(task))

    def forget(self, trial_id: str) -> None:
        """Drop the answers of a trial that has ended."""
        self._answers.pop(trial_id, None)

    def _drop_failed(self, trial_id: str, key: _Key, task: asyncio.Task[object]) -> None:
        # Not in `once`: the caller may be gone when the command fails. `exception` marks the error
        # as retrieved, else asyncio logs it.
        failed = task.cancelled() or not isinstance(task.exception(), GuestLost | None)
        answers = self._answers.get(trial_id, {})
        if failed and answers.get(key) is task:
            del answers[key]
            if not answers:  # nobody would call `forget` for a trial that was never watched
                del self._answers[trial_id]


async def _as_coroutine(do: Callable[[], Awaitable[object]]) -> object:
    return await do()

"""A command that is sent again gets the stored answer. It is carried out again if it failed, or if
its answer was forgotten; but a lost guest stays the answer."""

import asyncio

import pytest

from hintfleet.errors import GuestLost, TransientError
from hintfleet.v1 import host_pb2
from host_agent.repeated_commands import ANSWERS_WITHOUT_TRIAL, RepeatedCommands

COMMAND = host_pb2.CommandId(run_id="r", trial_id="t", sequence=1)


class Work:
    """Work that waits until the test sets `may_end`. The first call then fails; later calls return
    how many calls have begun, with the first."""

    def __init__(self, error: Exception) -> None:
        self.may_end = asyncio.Event()
        self._error = error
        self._count = 0

    async def do(self) -> int:
        self._count += 1
        await self.may_end.wait()
        if self._count == 1:
            raise self._error
        return self._count


async def retried_after_the_caller_left(error: Exception) -> int:
    """Return the answer to the first retry of a command that failed when nobody waited for it."""
    commands, work = RepeatedCommands(), Work(error)
    caller = asyncio.create_task(commands.once(COMMAND, work.do))
    await asyncio.sleep(0)
    caller.cancel()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.sleep(0.01)
    return await commands.once(COMMAND, work.do)


def test_a_command_that_failed_without_its_caller_is_carried_out_again() -> None:
    assert asyncio.run(retried_after_the_caller_left(TransientError("the link was down"))) == 2


def test_a_lost_guest_stays_the_answer() -> None:
    with pytest.raises(GuestLost, match="it crashed"):
        asyncio.run(retried_after_the_caller_left(GuestLost("it crashed")))


def test_all_who_wait_get_the_error_and_then_it_is_forgotten() -> None:
    async def scenario() -> None:
        commands, work = RepeatedCommands(), Work(TransientError("the link was down"))
        work.may_end.set()
        both = [commands.once(COMMAND, work.do) for _ in range(2)]
        for answer in await asyncio.gather(*both, return_exceptions=True):
            assert isinstance(answer, TransientError)
        assert [await commands.once(COMMAND, work.do) for _ in range(2)] == [2, 2]

    asyncio.run(scenario())


def test_of_commands_of_no_trial_only_the_last_are_remembered() -> None:
    """No end of a trial drops their answers, and a host agent runs for months."""
    commands, count = RepeatedCommands(), 0

    async def do() -> int:
        nonlocal count
        count += 1
        return count

    async def answers(numbers: range, trial_id: str = "") -> list[int]:
        ids = (host_pb2.CommandId(run_id=f"{n}", trial_id=trial_id, sequence=1) for n in numbers)
        return [await commands.once(one, do) for one in ids]

    async def scenario() -> None:
        assert await answers(range(1), trial_id="t") == [1]
        first = await answers(range(ANSWERS_WITHOUT_TRIAL + 1))
        assert await answers(range(1, ANSWERS_WITHOUT_TRIAL + 1)) == first[1:]
        assert await answers(range(1)) == [first[-1] + 1], "it was forgotten"
        assert await answers(range(1), trial_id="t") == [1], "its trial has not ended"

    asyncio.run(scenario())

"""Tasks that go on until their work is done, even if their caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class LastingTasks:
    """Tasks that go on when their caller is cancelled.

    A thread that looks at a guest's RAM cannot be stopped, and a change of a guest's memory must
    not be left half done.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """:param failed: is given the error that ended a task nobody waits for. That is a bug:
        the task itself handles all errors that can be expected.
        """
        self._failed = failed
        # The event loop keeps only weak references to tasks (asyncio.create_task's docs): one
        # that nobody else refers to may be collected before it is done.
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that nobody waits for."""
        task = self._start(work)
        task.add_done_callback(self._report_error)
        return task

    async def finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work and return its result; it goes on if the caller is cancelled."""
        # shield: cancelling the caller cancels what it awaits otherwise.
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

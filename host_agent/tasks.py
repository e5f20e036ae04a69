"""Tasks that must not end before their work does, whoever asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class LastingTasks:
    """Tasks that go on when their caller is cancelled.

    A thread that looks at a guest's RAM cannot be called back, and what changes its memory
    must not stay half done.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """:param failed: told what ended a task that nobody waits for: a bug, for all that can be
        foreseen is dealt with in the task.
        """
        self._failed = failed
        # asyncio itself keeps only weak references to tasks.
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that nobody waits for."""
        task = self._start(work)
        task.add_done_callback(self._look)
        return task

    async def finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work and return what it returns; it goes on if the caller is cancelled."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _look(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

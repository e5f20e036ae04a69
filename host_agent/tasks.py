"""Tasks that go on by themselves when their caller is cancelled, which does not wait for them; and
the errors of work on several guests at once: the first is raised, the others are logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from hintfleet.errors import HintfleetError
from hintfleet.logs import fields

_T = TypeVar("_T")

_log = logging.getLogger("hintfleet.host.guest")


class LastingTasks:
    """Tasks that continue when their caller is cancelled.

    Work on a guest's memory needs them: a thread that looks at RAM cannot be stopped, and a change
    of the memory must not be left half done.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """:param failed: called with the error that ended a task of `begin`. Such an error is a
        bug: the task itself handles all errors that can be expected.
        """
        self._failed = failed
        # The event loop keeps only weak references to tasks (asyncio.create_task's docs): a task
        # without another reference may be garbage collected before it is done.
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that nobody awaits, and return its task. Its error is given to `failed`."""
        task = self._start(work)
        task.add_done_callback(self._report_error)
        return task

    async def finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work in a task and return its result. If the caller is cancelled, the task
        continues."""
        # Without shield, cancelling the caller would also cancel the task that the caller awaits.
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)


def raise_first(names: Iterable[str], errors: Iterable[BaseException | None]) -> None:
    """Raise the first of `errors` that is not None, if there is one; log the others.

    :param names: the guests' names, in the order of `errors`.
    """
    failed = [(name, error) for name, error in zip(names, errors, strict=True) if error is not None]
    for name, error in failed[1:]:
        _log.error("another guest failed, too", **about_failure(name, error))
    if failed:
        raise failed[0][1]


def about_failure(name: str, error: BaseException) -> dict[str, Any]:
    """Return keyword arguments for a logging call: which guest failed, with which error."""
    if isinstance(error, HintfleetError):
        return {"extra": fields(guest=name, reason=error.message)}
    return {"extra": fields(guest=name), "exc_info": error}

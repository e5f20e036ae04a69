"""The host agent's side of one open stream to a guest: messages to send, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from hintfleet.errors import HintfleetError, TransientError

# How many messages may wait here while the transport's window is full. A guest that is further
# behind probably does not read at all, so its stream is ended.
_MAX_UNREAD_MESSAGES = 64

# Grace period: how long a stream may take to send what is queued, after `end`.
_GRACE_S = 2.0


class Stream:
    """A queue of messages to a guest, ended with an error or without.

    The task that writes to the stream does so in a `with` block of it. A guest that does not read
    can block that task for ever, so the task is cancelled if it does not leave the block within a
    grace period after `end`.
    """

    def __init__(
        self,
        abort: Callable[[HintfleetError], Awaitable[None]] | None = None,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        """:param abort: ends the stream at once with an error, even while a task writes to it. None
            if this is impossible: then a task stays blocked whose guest does not read.
        :param on_closed: called when the stream uses no memory of this process any more.
        """
        self._queue: asyncio.Queue[object] = asyncio.Queue()
        self._abort = abort
        self._on_closed = on_closed
        self._ended = False
        self.why_ended = "the guest closed it, or the link was cut"
        """Why the stream ended, for people; valid once it has ended."""
        self._writer: asyncio.Task[object] | None = None
        self._force_close_timer: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None

    def __enter__(self) -> Stream:
        self._writer = asyncio.current_task()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended, self._writer = True, None
        if self._force_close_timer is not None:
            self._force_close_timer.cancel()
        if self._aborting is None:
            self._on_closed()

    def send(self, message: object) -> None:
        """Queue a message for the guest. If too many are queued, drop it and end the stream."""
        if self._queue.qsize() < _MAX_UNREAD_MESSAGES:
            self._queue.put_nowait(message)
        else:
            self.end(TransientError("the guest does not read what it is sent"))

    def end(self, error: HintfleetError | None = None) -> None:
        """End the stream when the queued messages are sent, or by force after a grace period. Later
        calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self.why_ended = error.message if error else "the host agent closed it"
        self._queue.put_nowait(_End(error))
        loop = asyncio.get_running_loop()
        self._force_close_timer = loop.call_later(
            _GRACE_S, self._force_close, error or TransientError("the stream was closed")
        )

    def _force_close(self, error: HintfleetError) -> None:
        if self._writer is not None and self._abort is not None:
            self._aborting = asyncio.create_task(self._abort_then_close(self._abort(error)))
            self._writer.cancel()

    async def _abort_then_close(self, abort: Awaitable[None]) -> None:
        # grpc.aio's `abort` returns only when the guest has read the status, or its connection is
        # closed. Until then the stream is counted as open, because it uses memory.
        try:
            await abort
        finally:
            self._on_closed()

    async def next(self) -> object | None:
        """Wait for the next message and return it; None if the stream was ended without error.

        :raises HintfleetError: the error that the stream was ended with.
        """
        item = await self._queue.get()
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            # Without its traceback: all later streams of a guest that is gone end with the same
            # error, and each `raise` adds its frames, and all that they use, to those before.
            raise item.error.with_traceback(None)
        return None


class _End:
    def __init__(self, error: HintfleetError | None) -> None:
        self.error = error

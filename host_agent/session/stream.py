"""One open stream to a guest, as the parts of the host agent that speak on it see it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from hintfleet.errors import HintfleetError, TransientError

_MOST_UNREAD = 64
"""Messages beyond what the transport's window holds: a reader that far behind reads nothing."""

_LAST_WORDS_S = 2.0


class Stream:
    """What the service has to say on one open stream; closed with an error or None.

    Used as a context by the task that writes to the stream. A guest that does not read can
    block that task for ever, so it is cancelled if it has not left soon after the end.
    """

    def __init__(
        self,
        abort: Callable[[HintfleetError], Awaitable[None]] | None = None,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        """:param abort: ends the stream at once, past a task that writes to it.
        :param on_closed: called when the stream holds nothing of ours any more.
        """
        self._queue: asyncio.Queue[object] = asyncio.Queue()
        self._abort = abort
        self._on_closed = on_closed
        self._ended = False
        self.why_ended = "the guest closed it, or the link was cut"
        """For people."""
        self._writer: asyncio.Task[object] | None = None
        self._last_words: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Task[None] | None = None

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
        if self._last_words is not None:
            self._last_words.cancel()
        if self._leaving is None:
            self._on_closed()

    def send(self, message: object) -> None:
        """Queue a message for the guest."""
        if self._queue.qsize() < _MOST_UNREAD:
            self._queue.put_nowait(message)
        else:
            self.end(TransientError("the guest does not read what it is sent"))

    def end(self, error: HintfleetError | None = None) -> None:
        """End the stream after what is queued; the first end counts."""
        if self._ended:
            return
        self._ended = True
        self.why_ended = error.message if error else "the host agent closed it"
        self._queue.put_nowait(_End(error))
        loop = asyncio.get_running_loop()
        self._last_words = loop.call_later(
            _LAST_WORDS_S, self._show_out, error or TransientError("the stream was closed")
        )

    def _show_out(self, error: HintfleetError) -> None:
        if self._writer is not None and self._abort is not None:
            self._leaving = asyncio.create_task(self._leave(self._abort(error)))
            self._writer.cancel()

    async def _leave(self, abort: Awaitable[None]) -> None:
        # Until the guest reads this, or its connection is gone.
        try:
            await abort
        finally:
            self._on_closed()

    async def next(self) -> object | None:
        """The next message; None at a clean end.

        :raises HintfleetError: the stream was ended with it.
        """
        item = await self._queue.get()
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            raise item.error
        return None


class _End:
    def __init__(self, error: HintfleetError | None) -> None:
        self.error = error

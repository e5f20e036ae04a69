"""What a guest was asked and has not answered yet.

A request goes with the stream that it was sent on, unless it is sent again on the next.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

from hintfleet.errors import HintfleetError, OutcomeUnknown
from host_agent.session.stream import Stream

_T = TypeVar("_T")

_NEWS_OF_LOSS_S = 1.0


class _Request:
    def __init__(self, stream: Stream, message: object) -> None:
        self.stream = stream
        self.message = message
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def fail(self, error: HintfleetError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Requests:
    """The open requests to one guest, by their ids."""

    def __init__(self) -> None:
        # From the clock: a guest remembers what it answered an earlier host agent.
        self._ids = itertools.count(time.time_ns() // 1000)
        self._open: dict[int, _Request] = {}

    async def ask(
        self,
        stream: Stream,
        make: Callable[[int], object],
        answer_type: type[_T],
        request_id: int = 0,
    ) -> _T:
        """Send what `make` makes of an id, and wait for its answer.

        :param request_id: 0 for a new one. No open request may have it.
        :raises OutcomeUnknown: the guest answered with something else.
        :raises HintfleetError: what the request was failed with.
        """
        request_id = request_id or next(self._ids)
        request = self._open[request_id] = _Request(stream, make(request_id))
        try:
            stream.send(request.message)
            message = await request.answer
        finally:
            del self._open[request_id]
        if not isinstance(message, answer_type):
            raise OutcomeUnknown("the guest answered with something else")
        return message

    def answered(self, request_id: int, message: object) -> None:
        """An answer came; one that nobody waits for is dropped."""
        request = self._open.get(request_id)
        if request is not None and not request.answer.done():
            request.answer.set_result(message)

    def send_again(self, stream: Stream, kind: type[object]) -> None:
        """Move all open requests of this kind to another stream."""
        for request in self._open.values():
            if isinstance(request.message, kind):
                request.stream = stream
                stream.send(request.message)

    def fail_all(self, error: HintfleetError) -> None:
        """Nothing will be answered any more."""
        for request in self._open.values():
            request.fail(error)

    def fail_soon(self, stream: Stream, error: HintfleetError) -> None:
        """A stream has ended. That is often because its guest does, and that news takes its
        own way; it is given time to arrive, for it says more. So is the next stream."""
        loop = asyncio.get_running_loop()
        loop.call_later(_NEWS_OF_LOSS_S, self._fail, stream, error)

    def _fail(self, stream: Stream, error: HintfleetError) -> None:
        for request in self._open.values():
            if request.stream is stream:
                request.fail(error)

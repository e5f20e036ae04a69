"""Requests to a guest that it has not answered yet.

When the stream on which a request was sent ends, the request fails a second later. Only a command
to the workload does not fail, if the workload attaches again within this time: it is sent again on
the new stream. (Commands that the orchestrator repeats: repeated_commands.py.)
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

# How long requests on an ended stream wait for a better reason to fail, or for the next stream.
_FAIL_AFTER_S = 1.0


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
        # From the clock, not from 1: a guest remembers the ids that it answered to an earlier
        # host agent, and would answer a new command with the same id from memory.
        self._ids = itertools.count(time.time_ns() // 1000)
        self._open: dict[int, _Request] = {}

    async def ask(
        self,
        stream: Stream,
        make: Callable[[int], object],
        answer_type: type[_T],
        request_id: int = 0,
    ) -> _T:
        """Send the message that `make` returns for an id, and wait for its answer.

        :param request_id: 0 for a new id. No open request may have the same id.
        :raises OutcomeUnknown: the answer is not of `answer_type`.
        :raises HintfleetError: the error of `fail_all` or `fail_soon`.
        """
        request_id = request_id or next(self._ids)
        request = self._open[request_id] = _Request(stream, make(request_id))
        try:
            stream.send(request.message)
            message = await request.answer
        finally:
            del self._open[request_id]
        if not isinstance(message, answer_type):
            raise OutcomeUnknown(f"the guest answered with {type(message).__name__}")
        return message

    def answered(self, request_id: int, message: object) -> None:
        """Give an answer to the request with this id; drop it if none waits for it."""
        request = self._open.get(request_id)
        if request is not None and not request.answer.done():
            request.answer.set_result(message)

    def send_again(self, stream: Stream, kind: type[object]) -> None:
        """Send all open requests whose message is of type `kind` again, on this stream. From now on
        they fail with this stream, not with the one before."""
        for request in self._open.values():
            if isinstance(request.message, kind):
                request.stream = stream
                stream.send(request.message)

    def fail_all(self, error: HintfleetError) -> None:
        """Fail all open requests."""
        for request in self._open.values():
            request.fail(error)

    def fail_soon(self, stream: Stream, error: HintfleetError) -> None:
        """After a grace period, fail the requests that are still on a stream that has ended."""
        # A stream often ends because its guest has ended. Then the driver soon reports that, and
        # `fail_all` gives the requests this better reason. Or `send_again` moves the workload's
        # commands to its new stream.
        loop = asyncio.get_running_loop()
        loop.call_later(_FAIL_AFTER_S, self._fail, stream, error)

    def _fail(self, stream: Stream, error: HintfleetError) -> None:
        for request in self._open.values():
            if request.stream is stream:
                request.fail(error)

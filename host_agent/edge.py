"""Where errors and streams meet gRPC, for both services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from grpc import aio

from hintfleet.errors import HintfleetError, to_status
from host_agent.guest import Stream

Context = aio.ServicerContext[Any, Any]


async def abort(context: Context, error: HintfleetError) -> NoReturn:
    """End the call with the status that carries `error`."""
    code, details, metadata = to_status(error)
    await context.abort(code, details, metadata)
    raise error  # not reached: abort raises


@asynccontextmanager
async def ended_by(stream: Stream, reader: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run `reader` meanwhile; when it ends, with an error or without, so does `stream`."""
    task = asyncio.create_task(_read_then_end(stream, reader))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _read_then_end(stream: Stream, reader: Coroutine[object, object, None]) -> None:
    try:
        await reader
    except HintfleetError as error:
        stream.end(error)
    else:
        stream.end()

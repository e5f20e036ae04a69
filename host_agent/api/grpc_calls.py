"""Helpers for the gRPC services: error statuses, for both services; reading and ending
streams, for the guests' service; the check of operators' certificates, for the control API."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from hintfleet.errors import HintfleetError, InvalidInput, TransientError, to_status
from hintfleet.net.tls import Role, check_role
from host_agent.session.stream import Stream

Context = aio.ServicerContext[Any, Any]
_M = TypeVar("_M")

_log = logging.getLogger("hintfleet.host.api")


async def abort(context: Context, error: HintfleetError) -> NoReturn:
    """End the call with the status for `error`. Always raises."""
    code, details, metadata = to_status(error)
    await context.abort(code, details, metadata)
    raise error  # not reached: `context.abort` raises


class OperatorsOnly(aio.ServerInterceptor):  # type: ignore[type-arg] # generic in stubs only
    """On a TLS connection, refuses every call without an operator's certificate, also calls to the
    health and reflection services. Allows every call on a connection without TLS: there, the unix
    socket's permissions or the loopback address limit who can connect."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the call's handler, wrapped in the check; None if there is no handler."""
        handler = await continuation(handler_call_details)
        return _for_operators_only(handler) if handler else handler


def _for_operators_only(handler: Any) -> Any:
    streams = ("unary" if not handler.request_streaming else "stream") + (
        "_unary" if not handler.response_streaming else "_stream"
    )
    inner = getattr(handler, streams)

    async def check(context: Context) -> None:
        try:
            check_role(context.auth_context(), Role.OPERATOR)
        except HintfleetError as error:
            await abort(context, error)

    async def answer(request: Any, context: Context) -> Any:
        await check(context)
        return await inner(request, context)

    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        await check(context)
        async for one in inner(request, context):
            yield one

    # A handler with a stream of answers is an async generator, or a coroutine that writes to its
    # context (Watch of grpc_health). grpc.aio treats the two differently, so the wrapper must be of
    # the same kind as the handler.
    guarded = answers if inspect.isasyncgenfunction(inner) else answer
    make = getattr(grpc, f"{streams}_rpc_method_handler")
    return make(guarded, handler.request_deserializer, handler.response_serializer)


async def force_close(context: Context, error: HintfleetError) -> None:
    """End the call with the status for `error`, from another task than the call's own. Raises
    nothing, even if the call has ended already."""
    # gRPC's `abort` always raises aio.BaseError, even after the call's end. This module's `abort`
    # raises HintfleetError only if gRPC's does not raise.
    with suppress(aio.BaseError, HintfleetError):
        await abort(context, error)


async def received(messages: AsyncIterator[_M]) -> AsyncIterator[_M]:
    """Yield the messages that the other side of a call sends.

    :raises InvalidInput: the other side sent bytes that are not a valid message.
    """
    # If a handler raises DecodeError, gRPC ends the call with status UNKNOWN, as if this side had
    # failed, and logs a traceback, which any client could cause.
    try:
        async for message in messages:
            yield message
    except DecodeError as error:
        raise InvalidInput(f"received bytes that are no message: {error}") from error


@asynccontextmanager
async def ended_by(stream: Stream, reader: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `reader` during the block. If `reader` ends first, end `stream`: with the HintfleetError
    that it raised, with a TransientError if it raised another error (a bug), else without error."""
    task = asyncio.create_task(_read_then_end(stream, reader))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        # A task that is cancelled before its first step never awaits `reader`. Without `close`,
        # Python would warn that the coroutine was never awaited.
        reader.close()


async def _read_then_end(stream: Stream, reader: Coroutine[object, object, None]) -> None:
    try:
        await reader
    except HintfleetError as error:
        stream.end(error)
    except Exception as error:  # noqa: BLE001 - the guest must hear of every error
        # End the stream: nobody reads it any more, but to its guest it would look alive.
        _log.error("reading a stream failed", exc_info=error)
        stream.end(TransientError(f"the host agent failed: {type(error).__name__}"))
    else:
        stream.end()

"""Where errors, streams and certificates meet gRPC, for both services."""

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
    """End the call with the status that carries `error`."""
    code, details, metadata = to_status(error)
    await context.abort(code, details, metadata)
    raise error  # not reached: abort raises


class ForOperators(aio.ServerInterceptor):  # type: ignore[type-arg] # generic in stubs only
    """Keeps all whose certificate is not an operator's out of a whole server, its health and
    reflection services included. Connections without TLS are the socket's affair."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Put the check before whatever handler the call has, if it has one."""
        handler = await continuation(handler_call_details)
        return _for_operators(handler) if handler else handler


def _for_operators(handler: Any) -> Any:
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

    guarded = answers if inspect.isasyncgenfunction(inner) else answer
    make = getattr(grpc, f"{streams}_rpc_method_handler")
    return make(guarded, handler.request_deserializer, handler.response_serializer)


async def show_out(context: Context, error: HintfleetError) -> None:
    """End the call from a task that is not its own: no exception is to come of it."""
    with suppress(aio.BaseError, HintfleetError):
        await abort(context, error)


async def received(messages: AsyncIterator[_M]) -> AsyncIterator[_M]:
    """What a call's other side says.

    :raises InvalidInput: bytes that are no message; gRPC would end the call as if this side
        had failed, and log it.
    """
    try:
        async for message in messages:
            yield message
    except DecodeError as error:
        raise InvalidInput(f"what was received is no message: {error}") from error


@asynccontextmanager
async def ended_by(stream: Stream, reader: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `reader` meanwhile; when it ends, with an error or without, so does `stream`."""
    task = asyncio.create_task(_read_then_end(stream, reader))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        reader.close()  # a task that was cancelled before it began has not awaited it


async def _read_then_end(stream: Stream, reader: Coroutine[object, object, None]) -> None:
    try:
        await reader
    except HintfleetError as error:
        stream.end(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the guest must hear of it
        # A stream whose messages nobody reads any more would look alive to its guest.
        _log.error("reading a stream failed", exc_info=error)
        stream.end(TransientError(f"the host agent failed: {type(error).__name__}"))
    else:
        stream.end()

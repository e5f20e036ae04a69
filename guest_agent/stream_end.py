"""How a stream with the host agent ended, and whether the agent may connect again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from hintfleet.errors import HintfleetError, InvalidInput, Refused, from_rpc_error

# The status codes after which to connect again would not help: the host refuses this guest's
# identity, has lost the guest, or says that this agent broke the protocol.
_FINAL_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ABORTED,
    }
)


def refusal(error: grpc.RpcError | None) -> HintfleetError | None:
    """Return the error with which the agent should end; None if it should connect again."""
    if error is None or error.code() not in _FINAL_CODES:
        return None
    found = from_rpc_error(error, "the host agent ended the hinting session")
    # Not InvalidInput: its exit code says that this agent was started in a wrong way, after which
    # systemd does not start it again.
    return Refused(found.message, hint=found.hint) if isinstance(found, InvalidInput) else found


def why_ended(tasks: Iterable[asyncio.Task[None]]) -> grpc.RpcError | None:
    """Return the gRPC error with which a task of the stream failed; None if no task failed.

    :raises Exception: a task failed with any other error, which is a bug.
    """
    why = None
    for task in tasks:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, grpc.RpcError):
            why = error
        elif error is not None:
            raise error
    return why

"""The error tree, its conversion to and from gRPC statuses, and the exit codes of commands.

    HintfleetError         any other error                          INTERNAL
    |-- TransientError     the same call may succeed later          UNAVAILABLE
    |-- StableError        the same call will fail again
    |   |-- InvalidInput   what was asked is wrong                  INVALID_ARGUMENT
    |   |-- Refused        this machine or guest cannot do it       FAILED_PRECONDITION
    |   `-- NotFound       there is no such thing                   NOT_FOUND
    |-- LimitExceeded      a bound was hit                          RESOURCE_EXHAUSTED
    |-- GuestLost          the guest is gone or not usable          ABORTED
    `-- OutcomeUnknown     it may or may not have been done         UNKNOWN

For each class in this tree, `from_status` returns the class that `to_status` converted, except for
StableError, which is only a base. The string of an error is for people: what failed and, if there
is a hint, on a line of its own what to try.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate
from urllib.parse import quote

import grpc


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNDECIDED = 3
    INTERRUPTED = 130


class HintfleetError(Exception):
    """Base of our errors that a user may see.

    :ivar message: what failed, with its details.
    :ivar hint: what to try; may be empty.
    """

    code = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.FAILED


class TransientError(HintfleetError):
    """The same call may succeed later: a link is down, a thing is busy."""

    code = grpc.StatusCode.UNAVAILABLE


class StableError(HintfleetError):
    """The same call will fail again, unless something has changed meanwhile."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class InvalidInput(StableError):
    """What was asked is wrong: a value, a file, a message."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.USAGE


class Refused(StableError):
    """This machine, host or guest, in its present state, cannot do what was asked."""


class NotFound(StableError):
    """There is no such guest or domain."""

    code = grpc.StatusCode.NOT_FOUND


class LimitExceeded(HintfleetError):
    """A bound on size, number or rate was hit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class GuestLost(HintfleetError):
    """The guest is gone, or has not become usable; the request was not wrong."""

    code = grpc.StatusCode.ABORTED


class OutcomeUnknown(HintfleetError):
    """The command may or may not have been done (deadline, link lost after sending)."""

    code = grpc.StatusCode.UNKNOWN


_BY_CODE: dict[grpc.StatusCode, type[HintfleetError]] = {
    kind.code: kind
    for kind in (
        HintfleetError,
        TransientError,
        Refused,
        InvalidInput,
        NotFound,
        LimitExceeded,
        GuestLost,
        OutcomeUnknown,
    )
} | {
    grpc.StatusCode.DEADLINE_EXCEEDED: OutcomeUnknown,
    grpc.StatusCode.CANCELLED: OutcomeUnknown,
}

_HINT_KEY = "hintfleet-hint-bin"
_MOST_DETAILS_BYTES = 4096
"""The most bytes of a status's details, counted in the percent-encoded form that gRPC sends."""
_MOST_HINT_BYTES = 1024
_GAP = " ... "
"""What stands for the middle of a message that is shortened."""


def to_status(
    error: HintfleetError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return the status code, details and trailing metadata that carry `error`.

    A message or a hint that is too long is shortened.
    """
    # gRPC replaces the whole status by RESOURCE_EXHAUSTED if its metadata exceed a limit, 8 KiB by
    # default (grpc.max_metadata_size in grpc/impl/channel_arg_names.h).
    metadata = ((_HINT_KEY, error.hint.encode()[:_MOST_HINT_BYTES]),) if error.hint else ()
    return error.code, _shortened(error.message), metadata


def _shortened(message: str) -> str:
    """Return `message`; if it is too long, without its middle."""
    # Both ends are kept: the start says what failed, the end may be the last lines of a log.
    if len(quote(message)) <= _MOST_DETAILS_BYTES:
        return message
    half_bytes = (_MOST_DETAILS_BYTES - len(quote(_GAP))) // 2
    end = _start_of(message[::-1], half_bytes)[::-1]
    return _start_of(message, half_bytes) + _GAP + end


def _start_of(text: str, most_bytes: int) -> str:
    """Return the longest start of `text` that has at most `most_bytes` when percent-encoded."""
    ends = list(accumulate(len(quote(letter)) for letter in text[:most_bytes]))
    return text[: bisect_right(ends, most_bytes)]


def from_status(
    code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, str | bytes]] = ()
) -> HintfleetError:
    """Return the error that `to_status` converted.

    DEADLINE_EXCEEDED and CANCELLED, which gRPC itself sets, become OutcomeUnknown; every other code
    that `to_status` never returns becomes the base class, HintfleetError.
    """
    hint = b"".join(
        v if isinstance(v, bytes) else v.encode() for k, v in metadata if k == _HINT_KEY
    )
    return _BY_CODE.get(code, HintfleetError)(details, hint=hint.decode(errors="replace"))


def from_rpc_error(error: grpc.RpcError, what: str) -> HintfleetError:
    """Return the error for a failed call.

    An UNAVAILABLE without a hint gets a hint to check the server and its address.

    :param what: the call and its target, as words; the message starts with them.
    """
    # grpc.RpcError itself has no code(), details() and trailing_metadata(); most subclasses have.
    code = error.code() if callable(getattr(error, "code", None)) else grpc.StatusCode.UNKNOWN
    details = error.details() if callable(getattr(error, "details", None)) else str(error)
    trailing = getattr(error, "trailing_metadata", None)
    metadata = trailing() if callable(trailing) else ()
    # gRPC wraps the reason of a failed connection: "failed to connect to all addresses; last
    # error: ...". Users need the innermost part only.
    reason = str(details).rpartition("last error: ")[2]
    found = from_status(code, f"{what}: {reason}", tuple(metadata or ()))
    if code is grpc.StatusCode.UNAVAILABLE and not found.hint:
        found.hint = "check that the server runs there, and that the address is right"
    return found

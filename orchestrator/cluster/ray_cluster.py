"""Decides which Ray cluster to use, and watches whether it and the node of this process are alive.

Does not import Ray, and does not start or join a cluster: ray_connection.py does that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from hintfleet.errors import HintfleetError, InvalidInput, Refused, TransientError
from hintfleet.net.addresses import address_problem

# Much shorter than Ray's own limit: where nobody answers, Ray keeps trying for minutes.
_ANSWER_TIMEOUT_S = 10.0
_ASK_EVERY_S = 2.0
# Long enough for a GCS to be restarted. Ray ends this process when the GCS has been away for 60 s
# (gcs_rpc_server_reconnect_timeout_s in src/ray/common/ray_config_def.h, 2.60). The end of the run
# must be stored before that.
_LOST_AFTER_S = 30.0

# Set before Ray is imported, because Ray reads some of them then. A variable that the user has set
# keeps its value.
RAY_ENVIRONMENT = {
    # Ray's memory monitor watches the whole machine, and would kill our actors when guests fill
    # its memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # Nothing is sent to Ray's developers.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Keeps Ray from changing CUDA_VISIBLE_DEVICES and the like: actors use no accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Under `uv run`, Ray would build an environment of its own for its workers
    # (ray/_private/runtime_env/uv_runtime_env_hook.py).
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@dataclass(frozen=True, kw_only=True)
class ClusterAddress:
    """Which Ray cluster to use.

    :ivar value: `auto`, or HOST:PORT of its GCS; empty for a private cluster on this machine.
    :ivar given: for messages: the value, and where it was given, such as `RAY_ADDRESS=auto`.
    :ivar otherwise: for hints: what to change so that a run uses this machine alone.
    """

    value: str
    given: str = ""
    otherwise: str = ""


PRIVATE = ClusterAddress(value="")


def cluster_address(option: str | None, environment: Mapping[str, str]) -> ClusterAddress:
    """Return the address in the option --address; without that option, the one in RAY_ADDRESS.

    `local` means a private cluster; so does a missing option with an empty or unset RAY_ADDRESS.

    :raises InvalidInput: it is not an address that can be used, for example one of the Ray Client.
    """
    if option is None:
        value, source, otherwise = (
            environment.get("RAY_ADDRESS", ""),
            "RAY_ADDRESS=",
            "unset RAY_ADDRESS",
        )
    else:
        value, source, otherwise = option, "--address ", "write --address local"
    given, otherwise = f"{source}{value}", f"{otherwise} to run on this machine alone"
    if value == "local" or (option is None and not value):
        return PRIVATE
    if value.startswith("ray://"):  # the Ray Client has no streaming generators
        raise InvalidInput(
            f"{given}: experiments cannot run over the Ray Client (ray://)",
            hint="run on a node of that cluster with RAY_ADDRESS=auto, or with HOST:PORT of its"
            f" GCS (`ray start` prints it; port 6379 by default); or {otherwise}",
        )
    host = value.rpartition(":")[0]
    if value != "auto" and (address_problem(value) or not re.fullmatch(r"[^\s/]+", host)):
        raise InvalidInput(
            f"{source}{value!r} is not the address of a Ray cluster",
            hint=f"write HOST:PORT of its GCS, or `auto` on one of its nodes; or {otherwise}",
        )
    return ClusterAddress(value=value, given=given, otherwise=otherwise)


def no_answer_error(address: ClusterAddress, reason: str) -> HintfleetError:
    """Return the error for a cluster that cannot be reached.

    :param reason: its first line becomes part of the message.
    """
    line = next(iter(reason.splitlines()), "")
    return TransientError(
        f"no Ray cluster answers at {address.given}: {line}",
        hint="check that it runs and that this machine is one of its nodes; or "
        f"{address.otherwise}",
    )


def cannot_join_error(address: ClusterAddress, reason: str) -> HintfleetError:
    """Return the error for a cluster that answers but cannot be used.

    :param reason: becomes part of the message, as one line.
    """
    line = " ".join(line.strip() for line in reason.splitlines())
    return Refused(
        f"cannot join the Ray cluster at {address.given}: {line}",
        hint="Ray and Python must have the same versions on all of its nodes; or "
        f"{address.otherwise}",
    )


def no_token_error(address: ClusterAddress) -> HintfleetError:
    """Return the error for a cluster that needs a token: this process has none, or a wrong one."""
    return Refused(
        f"the Ray cluster at {address.given} requires its token",
        hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to"
        f" the token that it was started with; or {address.otherwise}",
    )


def check_answers(address: ClusterAddress, check_alive: Any, request: Any) -> bool:
    """Ask a GCS once. Return False if it refuses the call because our token is missing or wrong,
    else True.

    :param address: as it was given; for messages.
    :param check_alive: the method CheckAlive of Ray's NodeInfoGcsService.
    :raises TransientError: no GCS answers within 10 s, the call fails, or what answers is no GCS.
    """
    try:
        check_alive(request, timeout=_ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code, why = _status(error)
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            raise no_answer_error(address, why) from error
        return False
    return True


class ClusterWatch:
    """Asks a GCS, at most once in 2 s, whether it and the node of this process are alive.

    Nothing runs in the background: `check`, called often, reads answers and sends requests.

    :ivar lost: whether `check` has raised.
    """

    def __init__(self, channel: grpc.Channel, check_alive: Any, request: Any) -> None:
        """Send the first request, without waiting for the answer.

        :param channel: `close` closes it.
        :param check_alive: the method CheckAlive of Ray's NodeInfoGcsService, on this channel.
        :param request: the argument of `check_alive`; names the node.
        """
        self._channel = channel
        self._ask: Callable[[], Any] = lambda: check_alive.future(
            request, timeout=_ANSWER_TIMEOUT_S
        )
        self._call = self._ask()
        self._asked_s = self._answered_s = time.monotonic()
        self.lost = False

    def check(self) -> None:
        """Check the answer to the last request, if it has come; send the next request when due.

        Does not wait for an answer.

        :raises TransientError: this process's node is dead, or the GCS has not answered for 30 s.
        """
        # Ray reports neither a dead GCS nor our dead node: without a timeout, a `ray.wait` for an
        # actor would then never return.
        now_s = time.monotonic()
        error = self._call.exception() if self._call.done() else None
        if self._call.done() and error is None:
            self._answered_s = now_s
            if not all(self._call.result().raylet_alive):
                raise self._gone("the Ray node of this process died (its raylet)")
        if now_s - self._answered_s > _LOST_AFTER_S:
            why = "no answer" if error is None else _status(error)[1]
            raise self._gone(f"the Ray cluster is gone, its GCS did not answer for 30 s: {why}")
        if self._call.done() and now_s - self._asked_s > _ASK_EVERY_S:
            self._call, self._asked_s = self._ask(), now_s

    def _gone(self, message: str) -> HintfleetError:
        self.lost = True
        return TransientError(message)

    def close(self) -> None:
        """Cancel the call in progress and close the channel."""
        self._call.cancel()
        self._channel.close()


def _status(error: Any) -> tuple[grpc.StatusCode, str]:
    """Return the status code of an RPC error, and its reason as text."""
    match error.code():
        case grpc.StatusCode.UNIMPLEMENTED as code:
            return code, "the server there is not the GCS of a Ray cluster"
        case grpc.StatusCode.DEADLINE_EXCEEDED as code:
            return code, f"no answer within {_ANSWER_TIMEOUT_S:g} s"
        case code:
            # gRPC puts text before the reason of a failed connection: return only what follows
            # the last "last error: ", or all if that is not in the text.
            return code, str(error.details()).rpartition("last error: ")[2]

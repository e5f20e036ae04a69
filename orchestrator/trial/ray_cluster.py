"""Finds the Ray cluster to use, spreads hosts over its nodes, and watches whether it is alive.

Does not import Ray: ray_actors.py does, and starts or joins the cluster.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from hintfleet.errors import HintfleetError, InvalidInput, Refused, TransientError
from hintfleet.net.addresses import address_problem

# Ray itself asks an address where nobody answers for minutes.
_ANSWER_TIMEOUT_S = 10.0
_ASK_EVERY_S = 2.0
# Long enough for a GCS to be restarted. Ray ends this process when its GCS was away for 60 s
# (gcs_rpc_server_reconnect_timeout_s in src/ray/common/ray_config_def.h, 2.60): the run has to
# be stored before.
_LOST_AFTER_S = 30.0

# Ray reads some of these when it is imported, so they are set before. A value of the user wins.
RAY_ENVIRONMENT = {
    # Ray's memory monitor watches the whole machine, and would kill our actors when guests fill
    # its memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # Nothing is sent to Ray's developers.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Leaves CUDA_VISIBLE_DEVICES and the like alone: actors use no accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Under `uv run`, Ray would build an environment of its own for its workers
    # (ray/_private/runtime_env/uv_runtime_env_hook.py).
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}

_UNSET_HINT = "unset RAY_ADDRESS to run on this machine alone"


def cluster_address(environment: Mapping[str, str]) -> str:
    """Return RAY_ADDRESS: `auto` or HOST:PORT; empty for a private cluster.

    :raises InvalidInput: it is neither of these.
    """
    address = environment.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return ""
    if address.startswith("ray://"):  # the Ray Client has no streaming generators
        raise InvalidInput(
            f"RAY_ADDRESS={address}: experiments cannot run over the Ray Client (ray://)",
            hint="run on a node of that cluster with RAY_ADDRESS=auto, or with HOST:PORT of its"
            f" GCS (`ray start` prints it; port 6379 by default); or {_UNSET_HINT}",
        )
    host = address.rpartition(":")[0]
    if address != "auto" and (address_problem(address) or not re.fullmatch(r"[^\s/]+", host)):
        raise InvalidInput(
            f"RAY_ADDRESS={address!r} is not the address of a Ray cluster",
            hint=f"write HOST:PORT of its GCS, or `auto` on one of its nodes; or {_UNSET_HINT}",
        )
    return address


def no_answer_error(address: str, reason: str) -> HintfleetError:
    """Return the error for a cluster that cannot be reached.

    :param reason: its first line becomes part of the message.
    """
    line = next(iter(reason.splitlines()), "")
    return TransientError(
        f"no Ray cluster answers at RAY_ADDRESS={address}: {line}",
        hint=f"check that it runs and that this machine is one of its nodes; or {_UNSET_HINT}",
    )


def cannot_join_error(address: str, reason: str) -> HintfleetError:
    """Return the error for a cluster that answers but cannot be used, e.g. another version."""
    line = " ".join(line.strip() for line in reason.splitlines())
    return Refused(
        f"cannot join the Ray cluster at RAY_ADDRESS={address}: {line}",
        hint=f"Ray and Python must have the same versions on all of its nodes; or {_UNSET_HINT}",
    )


def check_answers(
    address: str, check_alive: Any, request: Any, *, needs_token: bool = True
) -> None:
    """Ask once whether a GCS answers.

    :param check_alive: the method CheckAlive of Ray's NodeInfoGcsService.
    :param needs_token: False if Ray will find the token of the cluster by itself.
    :raises Refused: the cluster requires another token.
    :raises TransientError: no GCS answers within 10 s.
    """
    try:
        check_alive(request, timeout=_ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code, why = _status(error)
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            raise no_answer_error(address, why) from error
        if needs_token:
            raise Refused(
                f"the Ray cluster at RAY_ADDRESS={address} requires its token",
                hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to"
                f" the token that it was started with; or {_UNSET_HINT}",
            ) from error


class ClusterWatch:
    """Asks a GCS every 2 s whether it and the node of this process are alive.

    :ivar lost: `check` has found that they are not.
    """

    def __init__(self, channel: grpc.Channel, check_alive: Any, request: Any) -> None:
        """Ask for the first time.

        :param channel: closed by `close`.
        :param request: for `check_alive`; names the node.
        """
        self._channel = channel
        self._ask: Callable[[], Any] = lambda: check_alive.future(
            request, timeout=_ANSWER_TIMEOUT_S
        )
        self._call = self._ask()
        self._asked_s = self._answered_s = time.monotonic()
        self.lost = False

    def check(self) -> None:
        """Check the last answer, without waiting for one.

        :raises TransientError: the node is dead, or the GCS has not answered for 30 s.
        """
        # Ray does not say so itself: a `ray.wait` for an actor on a dead cluster never ends.
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


def spread(hosts: Sequence[str], nodes: Mapping[str, str], alive: Sequence[str]) -> dict[str, str]:
    """Choose a node for each host: the one with the fewest hosts.

    Ray's own strategy "SPREAD" sends actors that need no CPU to nodes at random: often all of
    four to one of two.

    :param nodes: where each host was until now.
    :param alive: nodes to choose from, at least one.
    """
    counts = Counter(node for host, node in nodes.items() if host not in hosts)
    chosen = {}
    for host in hosts:
        chosen[host] = min(alive, key=lambda node: counts[node])
        counts[chosen[host]] += 1
    return chosen


def _status(error: Any) -> tuple[grpc.StatusCode, str]:
    """Return the code of an RPC error, and the reason in one line."""
    match error.code():
        case grpc.StatusCode.UNIMPLEMENTED as code:
            return code, "the server there is not the GCS of a Ray cluster"
        case grpc.StatusCode.DEADLINE_EXCEEDED as code:
            return code, f"no answer within {_ANSWER_TIMEOUT_S:g} s"
        case code:
            # gRPC wraps the reason that a connection failed for in several layers.
            return code, str(error.details()).rpartition("last error: ")[2]

"""Which Ray cluster is used, and whether it is still there. Does not import Ray.

Left alone, Ray asks an address where nobody answers for minutes, and waits for ever for an
actor on a cluster that is gone; when its GCS was away for 60 s, it ends this process
(gcs_rpc_server_reconnect_timeout_s in src/ray/common/ray_config_def.h, 2.60).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from hintfleet.errors import HintfleetError, InvalidInput, Refused, TransientError
from hintfleet.net.addresses import address_problem

_ANSWER_TIMEOUT_S = 10.0
_ASK_EVERY_S = 2.0
_PATIENCE_S = 30.0
"""A GCS may be started again meanwhile. Less than the 60 s after which Ray ends this process."""

_UNSET_HINT = "unset RAY_ADDRESS to run on this machine alone"


def cluster_address(environment: Mapping[str, str]) -> str:
    """What RAY_ADDRESS says: `auto` or HOST:PORT; empty for a private cluster.

    :raises InvalidInput: it says something else.
    """
    address = environment.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return ""
    if address.startswith("ray://"):
        raise InvalidInput(
            f"RAY_ADDRESS={address}: over the Ray Client (ray://) no experiment can run",
            hint="run it on a node of that cluster with RAY_ADDRESS=auto, or with HOST:PORT of"
            f" its GCS (`ray start` says it; port 6379 by default); or {_UNSET_HINT}",
        )
    host = address.rpartition(":")[0]
    if address != "auto" and (address_problem(address) or not re.fullmatch(r"[^\s/]+", host)):
        raise InvalidInput(
            f"RAY_ADDRESS={address!r} is no address of a Ray cluster",
            hint=f"write HOST:PORT of its GCS, or `auto` on a node of it; or {_UNSET_HINT}",
        )
    return address


def no_answer_error(address: str, reason: str) -> HintfleetError:
    """The error for a cluster that cannot be connected to.

    :param reason: one line of it is said.
    """
    line = next(iter(reason.splitlines()), "")
    return TransientError(
        f"no Ray cluster answers at RAY_ADDRESS={address}: {line}",
        hint=f"check that it runs and that this machine is a node of it; or {_UNSET_HINT}",
    )


def cannot_join_error(address: str, reason: str) -> HintfleetError:
    """The error for a cluster that answers and cannot be used, as one of other versions."""
    said = " ".join(line.strip() for line in reason.splitlines())
    return Refused(
        f"cannot join the Ray cluster at RAY_ADDRESS={address}: {said}",
        hint=f"Ray and Python must be the same on all of it; or {_UNSET_HINT}",
    )


def check_answers(
    address: str, check_alive: Any, request: Any, *, needs_token: bool = True
) -> None:
    """Ask once whether a GCS is there.

    :param check_alive: the method of that name of Ray's NodeInfoGcsService.
    :param needs_token: if the cluster has one; else Ray will find it.
    :raises Refused: the cluster wants another token.
    :raises TransientError: there is none, or no answer within 10 s.
    """
    try:
        check_alive(request, timeout=_ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code, why = _status(error)
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            raise no_answer_error(address, why) from error
        if needs_token:
            raise Refused(
                f"the Ray cluster at RAY_ADDRESS={address} wants its token",
                hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to"
                f" the token that it was started with; or {_UNSET_HINT}",
            ) from error


class ClusterWatch:
    """Asks a GCS every other second whether it and this process's node live."""

    def __init__(self, channel: grpc.Channel, check_alive: Any, request: Any) -> None:
        """Own the channel.

        :param request: names the node.
        """
        self._channel = channel
        self._ask: Callable[[], Any] = lambda: check_alive.future(
            request, timeout=_ANSWER_TIMEOUT_S
        )
        self._call = self._ask()
        self._asked_s = self._answered_s = time.monotonic()
        self.lost = False

    def check(self) -> None:
        """Look at the last answer; does not wait for one.

        :raises TransientError: the node is dead, or nothing was heard for long.
        """
        now_s = time.monotonic()
        error = self._call.exception() if self._call.done() else None
        if self._call.done() and error is None:
            self._answered_s = now_s
            if not all(self._call.result().raylet_alive):
                raise self._gone("the Ray node of this process died (its raylet)")
        if now_s - self._answered_s > _PATIENCE_S:
            why = "no answer" if error is None else _status(error)[1]
            raise self._gone(f"the Ray cluster is gone, its GCS was away for 30 s: {why}")
        if self._call.done() and now_s - self._asked_s > _ASK_EVERY_S:
            self._call, self._asked_s = self._ask(), now_s

    def _gone(self, message: str) -> HintfleetError:
        self.lost = True
        return TransientError(message)

    def close(self) -> None:
        """Ask no more."""
        self._call.cancel()
        self._channel.close()


def _status(error: Any) -> tuple[grpc.StatusCode, str]:
    """Its code, and the reason in a line."""
    match error.code():
        case grpc.StatusCode.UNIMPLEMENTED as code:
            return code, "the server there is no GCS of a Ray cluster"
        case grpc.StatusCode.DEADLINE_EXCEEDED as code:
            return code, f"no answer within {_ANSWER_TIMEOUT_S:g} s"
        case code:
            # gRPC wraps the reason that a connection failed for in several layers.
            return code, str(error.details()).rpartition("last error: ")[2]

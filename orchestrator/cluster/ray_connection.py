"""Joins a Ray cluster, or starts a private one on loopback.

Imports Ray, as ray_actors.py does; ray_cluster.py has what needs no Ray.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hintfleet.errors import HintfleetError, TransientError
from orchestrator.cluster.ray_cluster import (
    RAY_ENVIRONMENT,
    ClusterAddress,
    ClusterWatch,
    cannot_join_error,
    check_answers,
    no_answer_error,
    no_token_error,
)
from orchestrator.cluster.signals import sigterm_handler_kept

if TYPE_CHECKING:
    import grpc

# Batches of records are small, so a small store is enough. Ray refuses less than 75 MiB
# (ray/_private/ray_constants.py, 2.60).
_OBJECT_STORE_BYTES = 80 << 20


def connect(address: ClusterAddress, runtime_dir: Path | None) -> ClusterWatch:
    """Join the cluster, or start a private one; begin to watch it, and this process's node.

    :param runtime_dir: of a private cluster, for Ray's files; None to join.
    :raises HintfleetError: the cluster cannot be reached or used, or does not start.
    """
    # Ray reads RAY_ADDRESS in several places, and prefers it where `auto` is passed as the address.
    os.environ.pop("RAY_ADDRESS", None)
    if address.value:
        os.environ["RAY_ADDRESS"] = address.value
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # log_to_driver would print the output of all actors on our stdout and stderr.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with sigterm_handler_kept():
        if runtime_dir is None:
            _connect(address, quiet)
        else:
            _start_private(runtime_dir, quiet)
    return _watch()


def _connect(address: ClusterAddress, quiet: dict[str, Any]) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    has_token = True
    try:
        # Ray resolves `auto`, and turns a loopback address into one that other nodes can reach.
        gcs_address = canonicalize_bootstrap_address(address.value) or address.value
        if gcs_address != address.value:
            address = replace(address, given=f"{address.given} ({gcs_address})")
        with _gcs_channel(gcs_address) as channel:
            has_token = check_answers(address, *_check_alive(channel))
        # No error yet for `auto`: ray.init then looks for the token of a local cluster itself. For
        # an address it does not (ray/_private/worker.py, 2.60).
        if not has_token and address.value != "auto":
            raise no_token_error(address)
        ray.init(address=address.value, **quiet)  # refuses a cluster with other versions
    except HintfleetError:
        raise
    except ConnectionError as error:
        if not has_token:
            raise no_token_error(address) from error
        raise no_answer_error(address, str(error)) from error
    except Exception as error:
        raise cannot_join_error(address, str(error.__cause__ or error)) from error


def _start_private(runtime_dir: Path, quiet: dict[str, Any]) -> None:
    os.environ |= {
        # Every user of this machine can reach its loopback, and a client of Ray can run code as
        # the user who started Ray. So clients must show a secret token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        # 0, the default on macOS and Windows, turns clusters of several nodes off. With 1, Ray
        # replaces 127.0.0.1 by an address that other machines can reach: get_node_ip_address in
        # ray/_private/services.py (2.60).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # No HTTP proxy, as is Ray's default. A user who has set 1 did so for other clusters, not
        # for this one on loopback.
        "RAY_grpc_enable_http_proxy": "0",
    }
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(runtime_dir / "ray"),
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    # ray/_private/node.py raises a bare Exception when one of Ray's processes does not start.
    except Exception as error:
        raise TransientError(f"Ray did not start: {first_line(error)}") from error


def _gcs_channel(address: str) -> grpc.Channel:
    """Open a channel to a GCS with Ray's own function, which uses Ray's token, TLS and proxies."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    return cast("grpc.Channel", init_grpc_channel(address, GLOBAL_GRPC_OPTIONS))


def _check_alive(channel: grpc.Channel, *node_ids: bytes) -> tuple[Any, Any]:
    """Return the GCS's method CheckAlive, and the request to ask it whether these nodes live."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    pb2: Any = gcs_service_pb2
    rpc: Any = gcs_service_pb2_grpc
    stub = rpc.NodeInfoGcsServiceStub(channel)
    return stub.CheckAlive, pb2.CheckAliveRequest(node_ids=node_ids)


def _watch() -> ClusterWatch:
    """Begin to watch the cluster that this process is connected to, and this process's node."""
    import ray

    context = ray.get_runtime_context()
    channel = _gcs_channel(context.gcs_address)
    return ClusterWatch(channel, *_check_alive(channel, bytes.fromhex(context.get_node_id())))


def first_line(error: Exception) -> str:
    """Return the first line of an error of Ray, which has many more: ids, nodes, addresses and
    advice."""
    return (str(error).splitlines() or [repr(error)])[0]

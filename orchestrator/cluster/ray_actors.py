"""Ray: joins or starts a cluster, asks its nodes what they are, and controls hosts through actors.

The only module that imports Ray; fleet.py decides what is done with it. Each actor carries many
hosts. A private cluster runs on loopback, and ends when it is closed.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.logs import fields
from hintfleet.system.owned_folders import OwnedFolder
from orchestrator.cluster import node_probe
from orchestrator.cluster.nodes import Node, node_of
from orchestrator.cluster.ray_cluster import (
    RAY_ENVIRONMENT,
    ClusterAddress,
    ClusterWatch,
    cannot_join_error,
    check_answers,
    no_answer_error,
    no_token_error,
)
from orchestrator.cluster.signals import signals_ignored, sigterm_handler_kept
from orchestrator.machine import runtime_dirs
from orchestrator.trial.host_group import HostGroup
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import Record

if TYPE_CHECKING:
    import grpc
    from ray import ObjectRef

# Batches of records are small, so a small store is enough. Ray refuses less than 75 MiB
# (ray/_private/ray_constants.py, 2.60).
_OBJECT_STORE_BYTES = 80 << 20
# How long to wait for actors to stop. Longer than `HostProcess.stop` waits for a host agent (25 s).
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.5
# How long a node may take to say what it is: it may first have to start a process for that.
_NODE_ANSWERS_WITHIN_S = 60.0
# With libvirt, the 120 s that the host agent's doctor may take (orchestrator/doctor.py) are added.
_LIBVIRT_ANSWERS_WITHIN_S = 180.0

_log = logging.getLogger("hintfleet.ray")


class ActorLost(TransientError):
    """An actor is gone or out of reach, or what it had sent was on a node that is gone."""


class Actor:
    """An actor on a node of the cluster; it carries hosts.

    `open`, `run` and `stop` return at once. `open` and `stop` return a reference: wait for it with
    `Cluster.ready`, then pass it to `result`. `run` returns a stream of batches: wait for each
    batch with `Cluster.ready`, then pass the stream to `next_batch`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def open(self) -> Any:
        """Begin to reach all of its hosts; see `HostGroup.open`."""
        return self._handle.open.remote()

    def run(self, tasks: Sequence[HostTask]) -> Any:
        """Begin to run its hosts' parts of a trial; see `HostGroup.run`."""
        # "streaming": Ray delivers each batch when the actor yields it, not all at the end.
        return self._handle.run.options(num_returns="streaming").remote(tasks)

    def stop(self) -> Any:
        """Begin to close the sessions of all of its hosts; see `HostGroup.close`."""
        return self._handle.stop.remote()

    def kill(self) -> None:
        """Kill its process. That closes the lifelines of its logical hosts, which then end."""
        import ray

        ray.kill(self._handle)


class Cluster:
    """The Ray cluster that this process uses. `close` it, also after an error."""

    def __init__(self, address: ClusterAddress) -> None:
        self.is_private = not address.value
        self._address = address
        self._runtime_dir: OwnedFolder | None = None  # None unless the cluster is private
        self._watch: ClusterWatch | None = None
        self._nodes: dict[str, Node] = {}  # by id, each as it was when it was asked
        self._actor_count = 0

    def open(self) -> None:
        """Join the cluster, or start a private one.

        :raises HintfleetError: the cluster cannot be reached or used, or does not start.
        """
        self._runtime_dir = runtime_dirs().make() if self.is_private else None
        _init_ray(self._address, self._runtime_dir.path if self._runtime_dir else None)
        self._watch = _watch()
        _log.info("ray connected", extra=fields(address=self._address.value or "private"))

    def close(self, actors: Iterable[Actor] = ()) -> None:
        """End these actors with their guests and logical hosts; end a private cluster, or leave
        another one.

        Waits up to 30 s for the actors; then kills them. Meanwhile Ctrl-C and SIGTERM are ignored
        (in the main thread). May be called twice.
        """
        import ray

        with signals_ignored():
            watch, self._watch = self._watch, None
            if watch is not None:
                watch.close()
            # Actors of a dead cluster are not called: no answer would ever come. Ray ends those
            # actors. That closes the lifelines of their logical hosts, whose host agents then end
            # the guests.
            if ray.is_initialized() and not (watch and watch.lost):
                actors = list(actors)
                stopping = [actor.stop() for actor in actors]
                if stopping:
                    ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_TIMEOUT_S)
                for actor in actors:  # also those that did not stop in time
                    actor.kill()
            ray.shutdown()
            if self._runtime_dir is not None:
                self._runtime_dir.remove()

    def nodes(self, libvirt_uri: str | None = None) -> list[Node]:
        """Return the nodes that are alive, sorted by name. Nodes that no earlier call has returned
        are asked what they are, for up to a minute, or three with libvirt.

        :param libvirt_uri: also ask new nodes whether libvirt guests can run there, at this URI;
            empty: at their host agents' default.
        :raises TransientError: the cluster is gone.
        """
        import ray

        listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        alive = {node["NodeID"]: node for node in listed if node["Alive"]}
        wanted = node_probe.versions()
        for node_id, answer in self._ask(alive.keys() - self._nodes, wanted, libvirt_uri).items():
            known = alive[node_id]
            self._nodes[node_id] = node_of(
                node_id, known["NodeName"], known["NodeManagerAddress"], answer, wanted
            )
        found = (self._nodes[node_id] for node_id in alive)
        return sorted(found, key=lambda node: (node.name, node.address, node.node_id))

    def _ask(
        self, node_ids: Collection[str], wanted: dict[str, str], libvirt_uri: str | None
    ) -> dict[str, Mapping[str, Any] | str]:
        """Return what each node answers to `node_probe.look`, or why there is no answer."""
        import ray

        # The module is sent with the question, because a node may lack it.
        ray.cloudpickle.register_pickle_by_value(node_probe)  # type: ignore[no-untyped-call]
        look = ray.remote(num_cpus=0, max_retries=0)(node_probe.look)
        pending = {
            look.options(scheduling_strategy=_on(node_id)).remote(wanted, libvirt_uri): node_id
            for node_id in node_ids
        }
        limit_s = _NODE_ANSWERS_WITHIN_S if libvirt_uri is None else _LIBVIRT_ANSWERS_WITHIN_S
        deadline_s = time.monotonic() + limit_s
        answers: dict[str, Mapping[str, Any] | str] = {}
        while pending and time.monotonic() < deadline_s:
            for ref in self.ready(pending):
                node_id = pending.pop(ref)
                try:
                    answers[node_id] = ray.get(ref)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    answers[node_id] = f"cannot be asked: {cause or _first_line(error)}"
        return answers | dict.fromkeys(pending.values(), f"did not answer in {limit_s:.0f} s")

    def start_actor(self, node_id: str, places: Sequence[HostPlace]) -> Actor:
        """Start an actor for these hosts on a node, without waiting until it runs."""
        import ray

        # num_cpus=0: any number of actors fits on a node. No restarts and no retries by Ray:
        # results/trial_outcome.py decides what is run again.
        actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_HostActor)
        there = actor_class.options(scheduling_strategy=_on(node_id))
        return Actor(there.remote(places, self._folder()))

    def _folder(self) -> Path | None:
        # None: the actor makes a folder on its own node. Else a new one for each actor: after an
        # actor died, its host agents may still be ending guests, and use the earlier folder.
        if self._runtime_dir is None:
            return None
        self._actor_count += 1
        return self._runtime_dir.path / str(self._actor_count)

    def ready(self, refs: Collection[Any]) -> list[Any]:
        """Wait up to half a second until one reference or stream is ready; return it in a list, or
        [].

        :raises TransientError: the cluster is gone, so no reference will ever be ready.
        """
        import ray

        # Without a timeout, Ray would wait for ever for an actor on a dead cluster.
        ready, _ = ray.wait(list(refs), timeout=_POLL_S)
        self.check()
        return ready

    def check(self) -> None:
        """Check that the cluster and the node of this process are alive.

        :raises TransientError: one of them is not.
        """
        if self._watch is not None:
            self._watch.check()


class _HostActor:
    """Runs on one node of the cluster, and controls many hosts from there.

    When the actor's process dies, the lifelines of its logical hosts close; then their host agents
    destroy their guests and exit.
    """

    # Ray runs the methods of a class that has `async def` methods on one event loop, concurrently:
    # so `stop` can run while `run` is not finished.

    def __init__(self, places: Sequence[HostPlace], folder: Path | None) -> None:
        self._group = HostGroup(places, folder)

    async def open(self) -> None:
        await self._group.open()

    async def run(self, tasks: Sequence[HostTask]) -> AsyncIterator[Sequence[Record]]:
        async for batch in self._group.run(tasks):
            yield batch

    async def stop(self) -> None:
        await self._group.close()


def result(ref: Any) -> Any:
    """Return the value of a reference that is ready.

    :raises ActorLost: the actor is gone or out of reach, or the value was lost with a node.
    :raises HintfleetError: the actor's method raised this or any other error; or Ray failed.
    """
    import ray

    try:
        return ray.get(ref)
    # Ray wraps an error that an actor's method raised; `cause` is that error.
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HintfleetError):
            raise error.cause from None
        raise HintfleetError(f"an actor failed: {error.cause!r}") from error
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.ActorUnschedulableError,
        ray.exceptions.ObjectLostError,
    ) as error:
        raise ActorLost(_first_line(error)) from error
    except ray.exceptions.RayError as error:
        raise TransientError(f"Ray failed: {_first_line(error)}") from error


def next_batch(stream: Any) -> Sequence[Record] | None:
    """Return the next batch of a stream that is ready; None after the last one.

    :raises HintfleetError: as `result` does.
    """
    try:
        ref = next(cast("Iterator[ObjectRef[Any]]", stream))
    except StopIteration:
        return None
    return cast("Sequence[Record]", result(ref))


def _on(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _first_line(error: Exception) -> str:
    # Ray's errors have many more lines: ids, nodes, addresses and advice.
    return (str(error).splitlines() or [repr(error)])[0]


def _init_ray(address: ClusterAddress, runtime_dir: Path | None) -> None:
    # Ray reads RAY_ADDRESS in several places, and prefers it where `auto` is passed as the address.
    os.environ.pop("RAY_ADDRESS", None)
    if address.value:
        os.environ["RAY_ADDRESS"] = address.value
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # log_to_driver would print the output of all actors on our stderr.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with sigterm_handler_kept():
        if runtime_dir is None:
            _connect(address, quiet)
        else:
            _start_private(runtime_dir, quiet)


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
        # For `auto`, ray.init itself looks for the token of a local cluster; for an address it
        # does not (ray/_private/worker.py, 2.60).
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
        raise TransientError(f"Ray did not start: {_first_line(error)}") from error


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

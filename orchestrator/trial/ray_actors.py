"""Runs the hosts under test as Ray actors, spread over the nodes of a cluster.

The only module that imports Ray. Each actor controls one host agent; the actor of a logical host
also starts the host agent. If RAY_ADDRESS is unset, empty or `local`, a private cluster is started
on loopback, and ended when the fleet is closed.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.logs import fields
from hintfleet.system.owned_folders import OwnedFolder
from orchestrator.machine import runtime_dirs
from orchestrator.trial.host_session import HostPlace, HostSession
from orchestrator.trial.plan import HostTask
from orchestrator.trial.ray_cluster import (
    RAY_ENVIRONMENT,
    ClusterWatch,
    cannot_join_error,
    check_answers,
    cluster_address,
    no_answer_error,
    spread,
)
from orchestrator.trial.records import HostDone, Record
from orchestrator.trial.signals import signals_ignored, sigterm_handler_kept

if TYPE_CHECKING:
    import grpc
    from ray import ObjectRef

# Records are small, so a small store is enough. Ray refuses less than 75 MiB
# (ray/_private/ray_constants.py, 2.60).
_OBJECT_STORE_BYTES = 80 << 20
# How long to wait for actors to stop. Longer than `HostProcess.stop` waits for a host agent (25 s).
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.5
_MORE_STARTS = 3
_START_AGAIN_AFTER_S = 1.0

_log = logging.getLogger("hintfleet.ray")


class Fleet(AbstractContextManager["Fleet"]):
    """All hosts of a run, as a context manager.

    When the block ends, also by an error or Ctrl-C, all guests, logical hosts, Ray processes
    and folders that the fleet created are gone within a bounded time.
    """

    def __init__(self, places: Mapping[str, HostPlace]) -> None:
        """Read RAY_ADDRESS. Nothing is started before the block begins.

        :raises InvalidInput: RAY_ADDRESS is not the address of a cluster.
        """
        self._places = places
        self._address = cluster_address(os.environ)
        self._runtime_dir: OwnedFolder | None = None  # None unless the cluster is private
        self._cluster: ClusterWatch | None = None
        self._actors: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}  # by host: the node of its last actor
        self._actors_started: Counter[str] = Counter()

    def __enter__(self) -> Fleet:
        """Connect to Ray, and start an actor for each host.

        :raises HintfleetError: the cluster or a host cannot be reached or used. All that was
            started has been ended.
        """
        try:
            self._runtime_dir = None if self._address else runtime_dirs().make()
            _init_ray(self._address, self._runtime_dir.path if self._runtime_dir else None)
            self._cluster = _watch()
            _log.info("ray connected", extra=fields(address=self._address or "private"))
            self._start_actors(list(self._places))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_trial(
        self, tasks: Mapping[str, HostTask], check: Callable[[], None] = lambda: None
    ) -> Iterator[Record]:
        """Run a trial on all hosts at once; yield their records as they arrive.

        The last record of each host is HostDone. If the actor of a host dies, HostDone says that
        the host is lost, and the host gets a new actor for the next trial.

        :param check: called before each record, and twice a second while no records arrive
            (guests boot); an exception that it raises ends the trial.
        :raises HintfleetError: a host cannot run the trial; or a host that was lost in an earlier
            trial cannot be reached again; or the cluster is gone.
        """
        import ray

        self._start_actors([host for host in tasks if host not in self._actors])
        # "streaming": Ray delivers each record when the actor yields it, not all at the end.
        streams: dict[Any, str] = {
            self._actors[host].run.options(num_returns="streaming").remote(task): host
            for host, task in tasks.items()
        }
        while streams:
            ready = self._ready(streams)
            check()
            for stream in ready:
                host = streams[stream]
                try:
                    yield _get(next(cast("Iterator[ObjectRef[Any]]", stream)))
                except StopIteration:
                    del streams[stream]
                # ObjectLostError: the node that still held the record died.
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    del streams[stream]
                    yield self._lost(tasks[host], error)

    def close(self) -> None:
        """End all guests, logical hosts and actors; end a private cluster, or leave another one.

        Takes some seconds, half a minute at most; meanwhile Ctrl-C and SIGTERM are ignored. May be
        called twice.
        """
        import ray

        with signals_ignored():
            actors, self._actors = self._actors, {}
            cluster, self._cluster = self._cluster, None
            if cluster is not None:
                cluster.close()
            # Actors of a dead cluster are not called: the calls would never return. Those actors
            # end with their nodes. That closes the lifelines of their logical hosts, whose host
            # agents then end the guests.
            if ray.is_initialized() and not (cluster and cluster.lost):
                stopping = [actor.stop.remote() for actor in actors.values()]
                if stopping:
                    ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_TIMEOUT_S)
                # Needed for the actors that did not stop in time: when an actor dies, the kernel
                # closes the lifeline of its logical host, and the host agent ends.
                for actor in actors.values():
                    ray.kill(actor)
            ray.shutdown()
            if self._runtime_dir is not None:
                self._runtime_dir.remove()

    def _start_actors(self, hosts: list[str]) -> None:
        """Start an actor for each host and wait until it has reached the host.

        :raises HintfleetError: an actor cannot reach its host, or died at each of four starts.
        """
        # Actors that died are started again. The GCS may have named a node that is dead already, or
        # a new node that not all other nodes know yet; a later start may succeed.
        died = self._open_actors(hosts)
        for _ in range(_MORE_STARTS):
            if died:
                time.sleep(_START_AGAIN_AFTER_S)
                died = self._open_actors(list(died))
        for host, error in died.items():
            raise TransientError(f"{host}: {_death_reason(error)}") from error

    def _open_actors(self, hosts: list[str]) -> dict[str, Exception]:
        """Start actors and wait until each has reached its host, or has died.

        :returns: the hosts of the actors that died, with Ray's error for each.
        :raises HintfleetError: an actor cannot reach its host.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # num_cpus=0: any number of hosts fits on a node. No restarts and no retries by Ray:
        # results/trial_outcome.py decides what is run again.
        actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_HostActor)
        for host, node in spread(hosts, self._nodes, _alive_nodes()).items():
            self._nodes[host] = node
            there = actor_class.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            )
            self._actors[host] = there.remote(self._places[host], self._folder(host))
        opening = {self._actors[host].open.remote(): host for host in hosts}
        died: dict[str, Exception] = {}
        while opening:
            for done in self._ready(opening):
                host = opening.pop(done)
                try:
                    _get(done)
                    _log.info("host reached", extra=fields(host=host))
                except (
                    ray.exceptions.RayActorError,
                    ray.exceptions.ActorUnschedulableError,
                ) as error:
                    _log.warning("actor died", extra=fields(host=host, reason=_first_line(error)))
                    died[host] = error
        return died

    def _ready(self, refs: Collection[Any]) -> list[Any]:
        """Wait up to half a second until one reference is ready; return it in a list, or [].

        :raises TransientError: the cluster is gone, so no reference will ever be ready.
        """
        import ray

        # Without a timeout, Ray would wait for ever for an actor on a dead cluster; neither the
        # check below nor the `check` of `run_trial` would be called.
        ready, _ = ray.wait(list(refs), timeout=_POLL_S)
        if self._cluster is not None:
            self._cluster.check()
        return ready

    def _folder(self, host: str) -> Path | None:
        # A new folder for each actor: after an actor died, its host agent may still be ending
        # guests, and uses the earlier folder.
        if self._runtime_dir is None:
            return None
        self._actors_started[host] += 1
        return self._runtime_dir.path / f"{host}.{self._actors_started[host]}"

    def _lost(self, task: HostTask, error: Exception) -> HostDone:
        with suppress(KeyError):
            del self._actors[task.host]
        about = {"host": task.host, "trial": task.trial.trial_id, "reason": _first_line(error)}
        _log.warning("actor died", extra=fields(**about))
        # results/trial_outcome.py decides whether a trial with a lost host is run again.
        return HostDone(
            host=task.host,
            trial_id=task.trial.trial_id,
            at_unix_us=time.time_ns() // 1000,
            undecided=f"{task.host}: {_death_reason(error)}",
            lost=True,
        )


def _alive_nodes() -> list[str]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["NodeID"] for node in nodes if node["Alive"]]
    # If no node is alive, return ours: ClusterWatch.check will soon raise the error.
    return sorted(alive) or [ray.get_runtime_context().get_node_id()]


def _death_reason(error: Exception) -> str:
    return f"its actor died: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    # Ray's errors have many more lines: ids, nodes, addresses and advice.
    return (str(error).splitlines() or [repr(error)])[0]


class _HostActor:
    """Controls one host, on any node of the cluster.

    When the actor's process dies, the lifeline of its logical host closes; then the host agent
    destroys its guests and exits.
    """

    # Ray runs the methods of a class that has `async def` methods on one event loop, concurrently:
    # so `stop` can run while `run` is not finished.

    def __init__(self, place: HostPlace, folder: Path | None) -> None:
        self._session = HostSession(place, folder)

    async def open(self) -> None:
        await self._session.open()

    async def run(self, task: HostTask) -> AsyncIterator[Record]:
        async for record in self._session.run(task):
            yield record

    async def stop(self) -> None:
        await self._session.close()


def _init_ray(address: str, runtime_dir: Path | None) -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # log_to_driver would print the output of all actors on our stderr.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with sigterm_handler_kept():
        if runtime_dir is None:
            _connect(address, quiet)
        else:
            _start_private(runtime_dir, quiet)


def _connect(address: str, quiet: dict[str, Any]) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    try:
        # Ray resolves `auto`, and turns a loopback address into one that other nodes can reach.
        gcs_address = canonicalize_bootstrap_address(address) or address
        where = address if address == gcs_address else f"{address} ({gcs_address})"
        with _gcs_channel(gcs_address) as channel:
            # For `auto`, ray.init itself looks for the token of a local cluster; for an address it
            # does not (ray/_private/worker.py, 2.60).
            check_answers(where, *_check_alive(channel), needs_token=address != "auto")
        ray.init(address=address, **quiet)  # refuses other versions of Ray and Python
    except HintfleetError:
        raise
    except ConnectionError as error:
        raise no_answer_error(address, str(error)) from error
    except Exception as error:
        raise cannot_join_error(address, str(error.__cause__ or error)) from error


def _start_private(runtime_dir: Path, quiet: dict[str, Any]) -> None:
    os.environ |= {
        # Every user of this machine can reach its loopback, and a client of Ray can run code as
        # the user who started Ray. So clients must show a secret token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        # 0 turns clusters of several nodes off, the default on macOS and Windows. Otherwise Ray
        # replaces 127.0.0.1 by an address that other machines can reach: get_node_ip_address in
        # ray/_private/services.py (2.60).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's default, too. A user who turned it on did so for other clusters, not for this one on
        # loopback.
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


def _get(ref: ObjectRef[Any]) -> Any:
    """Return the value of a reference.

    :raises HintfleetError: the actor's method raised this or any other error; or Ray failed.
    :raises ray.exceptions.RayActorError: the actor is gone.
    :raises ray.exceptions.ActorUnschedulableError: Ray does not know the actor's node.
    :raises ray.exceptions.ObjectLostError: the value was on a node that is gone.
    """
    import ray

    try:
        return ray.get(ref)
    # Ray wraps an error that an actor's method raised; `cause` is that error.
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HintfleetError):
            raise error.cause from None
        raise HintfleetError(f"a host's actor failed: {error.cause!r}") from error
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.ActorUnschedulableError,
        ray.exceptions.ObjectLostError,
    ):
        raise
    except ray.exceptions.RayError as error:
        raise TransientError(f"Ray failed: {_first_line(error)}") from error

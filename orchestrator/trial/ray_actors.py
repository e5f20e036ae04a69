"""The hosts under test as Ray actors, spread over the nodes of a cluster.

The only module that imports Ray. An actor speaks to one host agent; on a cluster
of one machine it also starts that host agent as a logical host. Without
RAY_ADDRESS a private cluster is started on loopback and ended with the fleet.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.logs import fields
from hintfleet.system.owned_folders import OwnedFolder
from orchestrator.machine import runtime_dirs
from orchestrator.trial.host_session import HostPlace, HostSession
from orchestrator.trial.plan import HostTask
from orchestrator.trial.ray_cluster import (
    ClusterWatch,
    cannot_join_error,
    check_answers,
    cluster_address,
    no_answer_error,
)
from orchestrator.trial.records import HostDone, Record
from orchestrator.trial.signals import signals_ignored, sigterm_handler_kept

if TYPE_CHECKING:
    import grpc
    from ray import ObjectRef

_OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum is 75 MiB; samples are small
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.5

# Set before Ray is imported; what the user has set wins.
_RAY_ENVIRONMENT = {
    # It watches the whole machine and would kill our actors when guests fill memory.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


_log = logging.getLogger("hintfleet.ray")


class Fleet:
    """All hosts of a run. Use as a context manager.

    On leaving, also by an error or Ctrl-C, every guest, logical host, Ray process
    and folder that it made is gone, within a bounded time.
    """

    def __init__(self, places: Mapping[str, HostPlace]) -> None:
        """:raises InvalidInput: RAY_ADDRESS is no address of a cluster."""
        self._places = places
        self._address = cluster_address(os.environ)
        self._runtime_dir: OwnedFolder | None = None  # of a private cluster
        self._cluster: ClusterWatch | None = None
        self._actors: dict[str, Any] = {}
        self._started: Counter[str] = Counter()

    def __enter__(self) -> Fleet:
        try:
            self._runtime_dir = None if self._address else runtime_dirs().make()
            _init_ray(self._address, self._runtime_dir.path if self._runtime_dir else None)
            self._cluster = _watch()
            _log.info("ray is there", extra=fields(address=self._address or "private"))
            self._start_actors(list(self._places))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run_trial(
        self, tasks: Mapping[str, HostTask], check: Callable[[], None] = lambda: None
    ) -> Iterator[Record]:
        """Run a trial on all hosts at once; yields their records as they come.

        The last record of each host is HostDone. A host whose actor dies is lost in
        this trial, and gets a new actor for the next one.

        :param check: called several times a second, also while there are no records, as when
            guests boot; what it raises ends the trial.
        :raises HintfleetError: a host cannot run this, or was lost and did not come back; or
            the cluster is gone.
        """
        import ray

        self._start_actors([host for host in tasks if host not in self._actors])
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
                # ObjectLostError: of a record that was still on a node that died.
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    del streams[stream]
                    yield self._lost(tasks[host], error)

    def close(self) -> None:
        """End everything. Ctrl-C is ignored meanwhile: for seconds, half a minute at the most."""
        import ray

        with signals_ignored():
            actors, self._actors = self._actors, {}
            cluster, self._cluster = self._cluster, None
            if cluster is not None:
                cluster.close()
            # On a cluster that is gone nobody hears: actors end with their node, and with
            # them the pipes that keep host agents and guests.
            if ray.is_initialized() and not (cluster and cluster.lost):
                stopping = [actor.stop.remote() for actor in actors.values()]
                if stopping:
                    ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_TIMEOUT_S)
                for actor in actors.values():
                    ray.kill(actor)
            ray.shutdown()
            if self._runtime_dir is not None:
                self._runtime_dir.remove()

    def _start_actors(self, hosts: list[str]) -> None:
        """Start an actor for each host, and have it reach its host.

        One that dies meanwhile is started anew, once: it may have been put on a node that was
        dead already, which Ray knows only now.

        :raises HintfleetError: it cannot reach its host, or died again.
        """
        died = self._open_actors(hosts)
        for host, error in self._open_actors(list(died)).items():
            raise TransientError(f"{host}: {_said(error)}") from error

    def _open_actors(self, hosts: list[str]) -> dict[str, Exception]:
        """Returns those that died of it, and why."""
        import ray

        actor_class = ray.remote(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )(_HostActor)
        for host in hosts:
            self._actors[host] = actor_class.remote(self._places[host], self._folder(host))
        opening = {self._actors[host].open.remote(): host for host in hosts}
        died: dict[str, Exception] = {}
        while opening:
            for done in self._ready(opening):
                host = opening.pop(done)
                try:
                    _get(done)
                    _log.info("host reached", extra=fields(host=host))
                except ray.exceptions.RayActorError as error:
                    _log.warning("actor died", extra=fields(host=host, reason=_first_line(error)))
                    died[host] = error
        return died

    def _ready(self, refs: Collection[Any]) -> list[Any]:
        """Those that are ready within a moment.

        :raises TransientError: the cluster is gone, so that none will ever be.
        """
        import ray

        ready, _ = ray.wait(list(refs), timeout=_POLL_S)
        if self._cluster is not None:
            self._cluster.check()
        return ready

    def _folder(self, host: str) -> Path | None:
        """A new one each time: the host agent of an actor that died may not have done
        with its own yet."""
        if self._runtime_dir is None:
            return None
        self._started[host] += 1
        return self._runtime_dir.path / f"{host}.{self._started[host]}"

    def _lost(self, task: HostTask, error: Exception) -> HostDone:
        with suppress(KeyError):
            del self._actors[task.host]
        about = {"host": task.host, "trial": task.trial.trial_id, "reason": _first_line(error)}
        _log.warning("actor died", extra=fields(**about))
        # What follows from `lost`: results/trial_outcome.py.
        return HostDone(
            host=task.host,
            trial_id=task.trial.trial_id,
            at_unix_us=time.time_ns() // 1000,
            undecided=f"{task.host}: {_said(error)}",
            lost=True,
        )


def _said(error: Exception) -> str:
    """Why an actor died."""
    return f"its actor died: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """Ray says where and how on many more."""
    return (str(error).splitlines() or [repr(error)])[0]


class _HostActor:
    """Runs on any node of the cluster; Ray calls its methods on one event loop.

    When its process dies, the pipe to a logical host closes, and the host agent
    there ends its guests and itself.
    """

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
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
        # What Ray makes of `auto`, and of a loopback address: one that others can reach.
        gcs_address = canonicalize_bootstrap_address(address) or address
        where = address if address == gcs_address else f"{address} ({gcs_address})"
        with _gcs_channel(gcs_address) as channel:
            # Ray finds the token of a cluster by itself only for `auto`.
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
        # Any user of this machine can reach its loopback, so the cluster has a secret.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        # Ray resolves 127.0.0.1 to an address that others can reach, unless clusters
        # are off (as they are elsewhere than on Linux): ray/_private/services.py.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Off by default; who has it on means other clusters, not this one on loopback.
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
    except Exception as error:  # a bare one, where a process of Ray's does not start (node.py)
        raise TransientError(f"Ray did not start: {_first_line(error)}") from error


def _gcs_channel(address: str) -> grpc.Channel:
    """A channel as Ray opens its own: with its tokens, its TLS, its choice of proxies."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    return cast("grpc.Channel", init_grpc_channel(address, GLOBAL_GRPC_OPTIONS))


def _check_alive(channel: grpc.Channel, *node_ids: bytes) -> tuple[Any, Any]:
    """The GCS's method that says whether it and these nodes live, and the request for it."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    pb2: Any = gcs_service_pb2
    rpc: Any = gcs_service_pb2_grpc
    stub = rpc.NodeInfoGcsServiceStub(channel)
    return stub.CheckAlive, pb2.CheckAliveRequest(node_ids=node_ids)


def _watch() -> ClusterWatch:
    """Watch the cluster that this process is connected to."""
    import ray

    context = ray.get_runtime_context()
    channel = _gcs_channel(context.gcs_address)
    return ClusterWatch(channel, *_check_alive(channel, bytes.fromhex(context.get_node_id())))


def _get(ref: ObjectRef[Any]) -> Any:
    """The value behind a reference, or the error that an actor raised, as it raised it.

    :raises ray.exceptions.RayActorError: the actor is gone.
    :raises ray.exceptions.ObjectLostError: the value was on a node that is gone.
    """
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HintfleetError):
            raise error.cause from None
        raise HintfleetError(f"a host's actor failed: {error.cause!r}") from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
        raise
    except ray.exceptions.RayError as error:
        raise TransientError(f"Ray failed: {_first_line(error)}") from error

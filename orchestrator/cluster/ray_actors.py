"""Ray: asks the nodes of a cluster what they are, and controls hosts through actors.

Only this module and ray_connection.py import Ray; fleet.py decides which actors are started and
what they do. Each actor carries many hosts. A private cluster runs on loopback, and ends when it is
closed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.logs import fields
from hintfleet.system.owned_folders import OwnedFolder
from orchestrator.cluster import node_probe
from orchestrator.cluster.nodes import Node, node_of
from orchestrator.cluster.ray_cluster import ClusterAddress, ClusterWatch
from orchestrator.cluster.ray_connection import connect, first_line
from orchestrator.cluster.signals import signals_ignored
from orchestrator.machine import runtime_dirs
from orchestrator.trial.host_group import HostGroup
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import Record

if TYPE_CHECKING:
    from ray import ObjectRef

# How long to wait for actors to stop. Longer than `HostProcess.stop` waits for a host agent (60 s).
_STOP_TIMEOUT_S = 70.0
_POLL_S = 0.5
# How long a node may take to say what it is: it may first have to start a process for that.
_NODE_ANSWERS_WITHIN_S = 60.0
# If it is also asked about libvirt: 120 s more, which the host agent's doctor may take
# (orchestrator/doctor.py).
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
    """The Ray cluster that this process uses. Call `close` in the end, also if `open` has
    failed."""

    def __init__(self, address: ClusterAddress) -> None:
        self.is_private = not address.value
        self._address = address
        self._runtime_dir: OwnedFolder | None = None  # None unless the cluster is private
        self._watch: ClusterWatch | None = None
        self._nodes: dict[str, Node] = {}  # by id, each as it was when it was asked
        # By node id: a question that has no answer yet, and the time until which to wait for it.
        self._questions: dict[str, tuple[Any, float]] = {}
        self._actor_count = 0

    def open(self) -> None:
        """Join the cluster, or start a private one.

        :raises HintfleetError: the cluster cannot be reached or used, or does not start.
        """
        self._runtime_dir = runtime_dirs().make() if self.is_private else None
        folder = self._runtime_dir.path if self._runtime_dir else None
        self._watch = connect(self._address, folder)
        _log.info("ray connected", extra=fields(address=self._address.value or "private"))

    def close(self, actors: Iterable[Actor] = ()) -> None:
        """End these actors with their guests and logical hosts; end a private cluster, or leave
        another one.

        Waits up to 70 s for the actors; then kills them. Meanwhile Ctrl-C and SIGTERM are ignored
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
        """Return the nodes that are alive, also those with a problem, sorted by name.

        Asks new nodes what they are, and waits for their answers up to a minute, or three with
        libvirt. Asks a node again only if the question was lost.

        :param libvirt_uri: also ask new nodes whether libvirt guests can run there, at this URI;
            empty: at their host agents' default.
        :raises TransientError: the cluster is gone, or Ray failed.
        """
        alive = {node["NodeID"]: node for node in self._listed() if node["Alive"]}
        wanted = node_probe.versions()
        found = {node_id: self._nodes[node_id] for node_id in self._nodes.keys() & alive}
        for node_id, answer in self._ask(alive.keys() - found, wanted, libvirt_uri).items():
            known = alive[node_id]
            found[node_id] = node_of(
                node_id, known["NodeName"], known["NodeManagerAddress"], answer, wanted
            )
        # A silent node may have been busy, and answer later; or it is about to be dead.
        self._nodes |= {node_id: node for node_id, node in found.items() if not node.is_silent}
        return sorted(found.values(), key=lambda node: (node.name, node.address, node.node_id))

    def _listed(self) -> list[dict[str, Any]]:
        """Return what Ray knows of its nodes.

        :raises TransientError: the cluster is gone, or Ray failed.
        """
        import ray

        # In a thread: if the cluster is gone, Ray does not return, and later ends the process.
        answer: Future[list[dict[str, Any]]] = Future()

        def ask() -> None:
            try:
                answer.set_result(ray.nodes())  # type: ignore[no-untyped-call]
            except Exception as error:  # noqa: BLE001 - it is raised in the other thread
                answer.set_exception(TransientError(f"Ray failed: {first_line(error)}"))

        threading.Thread(target=ask, daemon=True).start()
        while not wait([answer], _POLL_S).done:
            self.check()
        return answer.result()

    def _ask(
        self, node_ids: set[str], wanted: dict[str, str], libvirt_uri: str | None
    ) -> dict[str, Mapping[str, Any] | str | None]:
        """Return what each node answers to `node_probe.look`, or as text why it cannot; None if
        there is no answer in time, or the question was lost. A later call asks again only if it was
        lost; it returns an answer that was late, but does not wait for it."""
        import ray

        # The module is sent with the question, because a node may lack it.
        ray.cloudpickle.register_pickle_by_value(node_probe)  # type: ignore[no-untyped-call]
        look = ray.remote(num_cpus=0, max_retries=0)(node_probe.look)
        limit_s = _NODE_ANSWERS_WITHIN_S if libvirt_uri is None else _LIBVIRT_ANSWERS_WITHIN_S
        for node_id in node_ids - self._questions.keys():
            asked = look.options(scheduling_strategy=_on(node_id)).remote(wanted, libvirt_uri)
            self._questions[node_id] = asked, time.monotonic() + limit_s
        pending = {self._questions[node_id][0]: node_id for node_id in node_ids}
        deadline_s = max((self._questions[node_id][1] for node_id in node_ids), default=0.0)
        answers: dict[str, Mapping[str, Any] | str | None] = dict.fromkeys(node_ids)
        while pending:
            for ref in self.ready(pending):
                node_id = pending.pop(ref)
                del self._questions[node_id]
                try:
                    answers[node_id] = ray.get(ref)
                except (
                    # Ray does not know the new node everywhere yet; or the node is about to be
                    # dead, or busy. The next call asks again.
                    ray.exceptions.TaskUnschedulableError,
                    ray.exceptions.NodeDiedError,
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.OutOfMemoryError,
                ):
                    continue
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None) or error
                    answers[node_id] = f"cannot be asked: {first_line(cause)}"
            if time.monotonic() > deadline_s:
                break
        return answers

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
        """Wait up to half a second until a reference or stream is ready; return all that are.

        :raises TransientError: the cluster is gone, so no reference will ever be ready.
        """
        import ray

        # Without a timeout, Ray would wait for ever for an actor on a dead cluster.
        ready, _ = ray.wait(list(refs), timeout=_POLL_S)
        self.check()
        # All that are ready: by default ray.wait returns one, and one that is always ready would
        # hide the others.
        return ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if ready else []

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
        raise ActorLost(first_line(error)) from error
    except ray.exceptions.RayError as error:
        raise TransientError(f"Ray failed: {first_line(error)}") from error


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

"""Runs the hosts of a run on a Ray cluster: puts each host on a node and into an actor with other
hosts, and merges the streams of the actors.

placement.py decides where a host runs, ray_actors.py speaks with Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.logs import fields
from hintfleet.net.addresses import is_local
from orchestrator.cluster import node_probe
from orchestrator.cluster.nodes import Node, unusable_error
from orchestrator.cluster.placement import (
    Placement,
    check_nodes_named,
    groups,
    needs_libvirt,
    place,
    shortage,
    shortage_error,
)
from orchestrator.cluster.ray_actors import Actor, ActorLost, Cluster, next_batch, result
from orchestrator.cluster.ray_cluster import ClusterAddress
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import HostDone, Record

_MORE_STARTS = 3
_START_AGAIN_AFTER_S = 1.0
_LOOK_FOR_NODES_EVERY_S = 1.0

_log = logging.getLogger("hintfleet.fleet")


@dataclass(frozen=True, kw_only=True)
class _Group:
    """An actor, with the hosts that it carries."""

    actor: Actor
    node_id: str
    hosts: Sequence[str]


class Fleet(AbstractContextManager["Fleet"]):
    """All hosts of a run, as a context manager.

    When the block ends, also by an error or Ctrl-C, all guests, logical hosts and Ray processes
    that the fleet created are gone within a bounded time. So are its folders; but that of an actor
    that died may stay on a node of a cluster that others started, until the next run there.
    """

    def __init__(
        self,
        address: ClusterAddress,
        places: Sequence[HostPlace],
        *,
        libvirt_uri: str = "",
        wait_s: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Store the arguments. Nothing is started before the block begins.

        :param libvirt_uri: of the libvirt that nodes are asked about; empty: the host agent's
            default. They are asked only if a logical host needs libvirt, and not if the cluster is
            private.
        :param wait_s: how long to wait for nodes to join if some host fits on none; not used with a
            private cluster.
        :param say: called with a text for people when the fleet begins to wait for nodes, and if a
            node does not answer.
        """
        self._places = list(places)
        self._libvirt_uri = libvirt_uri if any(map(needs_libvirt, places)) else None
        self._wait_s = wait_s
        self._say = say
        self._cluster = Cluster(address)
        self._groups: list[_Group] = []
        self._nodes: dict[str, Node] = {}  # by id: all that hosts could be placed on so far

    def __enter__(self) -> Fleet:
        """Connect to Ray, and reach all hosts.

        After an error, all that was started has been ended.

        :raises InvalidInput: it is not certain on which node a host agent is.
        :raises Refused: some node cannot be used (other versions, missing packages); or some host
            found no node in time.
        :raises HintfleetError: the cluster or a host cannot be reached or used.
        """
        try:
            self._cluster.open()
            self._check_nodes()
            self.prepare()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_nodes(self) -> None:
        nodes = self._alive_nodes()
        if bad := [node for node in nodes if node.problem and not node.is_silent]:
            raise unusable_error(bad, node_probe.versions())
        for node in nodes:
            if node.is_silent:
                self._say(f"node {node.label} {node.problem}: no host runs there")

    def prepare(self) -> Mapping[str, Node]:
        """Give an actor to each host that has none yet, or has lost its actor; return the node of
        each host, by the host's name.

        :raises HintfleetError: there is no node for a host; or an actor cannot reach a host; or
            some actor died at each of four starts; or the cluster is gone.
        """
        # Actors that died are started again. The GCS may have named a node that is dead already, or
        # a new node that not all other nodes know yet; a later start may succeed.
        for starts_left in range(_MORE_STARTS, -1, -1):
            died = self._start_actors()
            if not died:
                break
            if not starts_left:
                host, error = died.popitem()
                raise TransientError(f"{host}: {_death_reason(error)}") from error
            time.sleep(_START_AGAIN_AFTER_S)
        return {host: self._nodes[node_id] for host, node_id in self._node_ids().items()}

    def run_trial(
        self, tasks: Mapping[str, HostTask], check: Callable[[], None] = lambda: None
    ) -> Iterator[Sequence[Record]]:
        """Run a trial on all hosts at once; yield batches of their records as they arrive.

        The last event of each host is HostDone. If an actor dies, each of its hosts that was not
        done gets a HostDone that says that it is lost; the next `prepare` gives all of its hosts
        another actor.

        :param check: called when batches have arrived, before they are read, and about twice a
            second while none arrive (guests boot); an exception that it raises ends the trial.
        :raises HintfleetError: a host cannot run the trial; or a host agent that was lost in an
            earlier trial cannot be reached again; or the cluster is gone.
        """
        streams: dict[Any, _Group] = {
            group.actor.run([tasks[host] for host in group.hosts]): group for group in self._groups
        }
        not_done = dict(tasks)
        while streams:
            ready = self._cluster.ready(streams)
            check()
            for stream in ready:
                try:
                    batch = next_batch(stream)
                except ActorLost as error:
                    group = streams.pop(stream)
                    self._remove(group, error)
                    batch = [
                        _lost(not_done[host], error) for host in group.hosts if host in not_done
                    ]
                if batch is None:
                    del streams[stream]
                    continue
                for record in batch:
                    if isinstance(record, HostDone):
                        not_done.pop(record.host, None)
                yield batch

    def close(self) -> None:
        """End the guests that were made for the run, all logical hosts and actors; end a private
        cluster, or leave another one.

        Waits up to 70 s for the actors; then kills them. Meanwhile Ctrl-C and SIGTERM are ignored
        (in the main thread). May be called twice.
        """
        groups, self._groups = self._groups, []
        self._cluster.close([group.actor for group in groups])

    def _start_actors(self) -> dict[str, ActorLost]:
        """Start actors for the hosts without one; wait until each has reached its hosts or died.

        :returns: a host of each actor that died, with the reason.
        :raises HintfleetError: there is no node for a host; or an actor cannot reach a host; or
            the cluster is gone.
        """
        placed = self._node_ids()
        waiting = [host.name for host in self._places if host.name not in placed]
        if not waiting:
            return {}
        placement, nodes = self._find_nodes(placed)
        self._nodes |= {node.node_id: node for node in nodes}
        self._keep_local_hosts(placement)
        places = {host.name: host for host in self._places}
        opening = {}
        for node_id, hosts in groups(waiting, placement.node_ids, nodes):
            actor = self._cluster.start_actor(node_id, [places[host] for host in hosts])
            group = _Group(actor=actor, node_id=node_id, hosts=hosts)
            self._groups.append(group)
            opening[actor.open()] = group
        died = {}
        while opening:
            for done in self._cluster.ready(opening):
                group = opening.pop(done)
                node = self._nodes[group.node_id].label
                try:
                    result(done)
                except ActorLost as error:
                    self._remove(group, error)
                    died[group.hosts[0]] = error
                    continue
                except HintfleetError as error:
                    if not self._cluster.is_private:
                        error.message = f"on node {node}: {error.message}"
                    raise
                for host in group.hosts:
                    _log.info("host reached", extra=fields(host=host, node=node))
        return died

    def _find_nodes(self, placed: Mapping[str, str]) -> tuple[Placement, list[Node]]:
        """Place the hosts that have no node yet; return where all hosts are placed, and all nodes
        that can be used. If a host fits on no node, wait up to `wait_s` for nodes that join; not in
        a private cluster.

        :raises HintfleetError: a host found no node in time; or it is not certain on which node a
            host agent is; or the cluster is gone.
        """
        started_s = time.monotonic()
        told = False
        while True:
            alive = self._alive_nodes()
            nodes = [node for node in alive if not node.problem]
            check_nodes_named(self._places, nodes)
            placement = place(self._places, nodes, placed)
            if not placement.missing:
                return placement, nodes
            waited_s = time.monotonic() - started_s
            # If no node is alive, this process's node is not alive either: `check` below will soon
            # raise an error that says so.
            no_more = self._cluster.is_private and nodes
            if alive and (no_more or waited_s >= self._wait_s):
                raise shortage_error(placement, nodes, waited_s)
            if alive and not told:
                told = True
                _log.warning("waiting for nodes", extra=fields(reason=shortage(placement)))
                self._say(f"{shortage(placement)}: waiting up to {self._wait_s:g} s for more nodes")
            time.sleep(_LOOK_FOR_NODES_EVERY_S)
            self._cluster.check()

    def _keep_local_hosts(self, placement: Placement) -> None:
        """Bind each host agent at a unix socket or on loopback to the node it was placed on, by
        Ray's id. Not if its node was named: a node that comes back has its name, but a new id.

        A cluster may begin with one node, and have several when an actor must be started again:
        then such an address alone no longer tells the node.
        """
        self._places = [
            replace(host, node=placement.node_ids[host.name])
            if host.address and is_local(host.address) and not host.node
            else host
            for host in self._places
        ]

    def _alive_nodes(self) -> list[Node]:
        return self._cluster.nodes(None if self._cluster.is_private else self._libvirt_uri)

    def _node_ids(self) -> dict[str, str]:
        return {host: group.node_id for group in self._groups for host in group.hosts}

    def _remove(self, group: _Group, error: ActorLost) -> None:
        self._groups.remove(group)
        group.actor.kill()  # it may be alive, but out of reach
        node = self._nodes[group.node_id].label
        about = {"node": node, "hosts": len(group.hosts), "reason": error.message}
        _log.warning("actor died", extra=fields(**about))


def _lost(task: HostTask, error: ActorLost) -> HostDone:
    # results/trial_outcome.py decides whether a trial with a lost host is run again.
    return HostDone(
        host=task.host,
        trial_id=task.trial.trial_id,
        at_unix_us=time.time_ns() // 1000,
        undecided=f"{task.host}: {_death_reason(error)}",
        lost=True,
    )


def _death_reason(error: ActorLost) -> str:
    return f"its actor died: {error.message}"

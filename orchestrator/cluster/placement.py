"""Decides on which node of a Ray cluster each host runs, and which hosts share an actor. Pure.

Each host needs memory of its node. A logical host under the driver libvirt also needs a node that
can run libvirt guests. A host agent at a unix socket or on loopback is on one certain node. A host
agent at any other address counts as reachable from all nodes, unless its node is named.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hintfleet.errors import HintfleetError, InvalidInput, Refused
from hintfleet.net.addresses import is_local
from hintfleet.settings import Driver
from hintfleet.units import format_size
from orchestrator.cluster.nodes import Node
from orchestrator.spec.memory_needs import ACTOR_BYTES, HOSTS_PER_ACTOR
from orchestrator.trial.host_place import HostPlace

_NODES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where hosts run.

    :ivar node_ids: the id of each placed host's node, by the host's name.
    :ivar missing: the hosts for which there is no node.
    """

    node_ids: Mapping[str, str]
    missing: Sequence[HostPlace]


def place(
    hosts: Sequence[HostPlace], nodes: Sequence[Node], placed: Mapping[str, str]
) -> Placement:
    """Choose a node for each host that is not in `placed`: of the nodes with what the host needs,
    the one that then has the fewest hosts for each processor. Then those of these
    hosts that are of one kind exchange nodes (`_in_order`).

    Ray does not choose: its strategy "SPREAD" sends actors that need no CPU to nodes at random.
    With four actors and two nodes, all four may go to the same node.

    :param nodes: those that are alive and have no problem.
    :param placed: the node ids of the hosts that stay where they are, by the host's name.
    """
    node_ids = dict(placed)
    on_node: dict[str, list[HostPlace]] = {node.node_id: [] for node in nodes}
    for host in hosts:
        if node_ids.get(host.name) in on_node:
            on_node[node_ids[host.name]].append(host)
    missing = []
    # First place hosts that can run on few nodes only: another host could take their room there.
    moving = [host for host in hosts if host.name not in placed]
    for host in sorted(moving, key=lambda host: not (host.node or needs_libvirt(host))):
        fitting = [
            node
            for node in nodes
            if _suits(host, node) and _fits(host, node, on_node[node.node_id])
        ]
        if not fitting:
            missing.append(host)
            continue
        chosen = min(fitting, key=lambda node: (len(on_node[node.node_id]) + 1) / node.processors)
        on_node[chosen.node_id].append(host)
        node_ids[host.name] = chosen.node_id
    return Placement(node_ids=node_ids | dict(_in_order(moving, node_ids, nodes)), missing=missing)


def actor_count(hosts: int, processors: float) -> int:
    """Return the number of actors that control so many hosts on a node.

    One for each 32 hosts or part of them, but not more than the node has whole processors; if it
    has less than one, one. An actor works in one thread, and takes 64 MiB of memory before it has
    any host (ACTOR_BYTES).
    """
    return min(math.ceil(hosts / HOSTS_PER_ACTOR), max(1, int(processors)))


def groups(
    hosts: Iterable[str], node_ids: Mapping[str, str], nodes: Sequence[Node]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield for each new actor the id of its node, and the names of its hosts.

    :param hosts: the names of those that have no actor yet; each has a node in `node_ids`.
    """
    of_node: defaultdict[str, list[str]] = defaultdict(list)
    for host in hosts:
        of_node[node_ids[host]].append(host)
    processors = {node.node_id: node.processors for node in nodes}
    for node_id, names in of_node.items():
        count = actor_count(len(names), processors[node_id])
        for i in range(count):
            yield node_id, names[i * len(names) // count : (i + 1) * len(names) // count]


def check_nodes_named(hosts: Sequence[HostPlace], nodes: Sequence[Node]) -> None:
    """Check that no host agent's node is in doubt.

    :raises InvalidInput: a host agent is at a unix socket or on loopback, there are several nodes,
        and its node is not named; or several nodes have the name that is given for its node.
    """
    for host in hosts:
        called = [node.label for node in nodes if host.node and node.is_called(host.node)]
        if len(called) > 1:
            raise InvalidInput(
                f"{host.name}: {len(called)} nodes are called {host.node!r}",
                hint="give each node a name of its own (ray start --node-name NAME)",
            )
        if not host.node and host.address and is_local(host.address) and len(nodes) > 1:
            raise InvalidInput(
                f"{host.name}: {host.address} is an address on one machine, and the Ray cluster "
                f"has {len(nodes)} nodes",
                hint="say which node: in the spec {address: ..., node: NAME}, or "
                f"--host {host.address},node=NAME; nodes: {_names(nodes)}",
            )


def shortage_error(placement: Placement, nodes: Sequence[Node], waited_s: float) -> HintfleetError:
    """Return the error for hosts that have no node: how many of which kind; and for up to 8 nodes
    how many hosts are placed there, and what memory and libvirt the node has."""
    taken = Counter(placement.node_ids.values())
    missing = shortage(placement)
    there = [f"{node.label}: {_offer(node, taken[node.node_id])}" for node in nodes[:_NODES_SHOWN]]
    if len(nodes) > _NODES_SHOWN:
        there.append(f"and {len(nodes) - _NODES_SHOWN} more nodes")
    return Refused(
        "\n  ".join(
            (f"{missing}, after {waited_s:.0f} s; the Ray cluster has", *(there or ["no node"]))
        ),
        hint="start more nodes, or nodes with what is missing; use fewer or smaller hosts "
        "(hosts.count, guests.per_host); timeouts: {nodes: 10min} waits longer for nodes",
    )


def shortage(placement: Placement) -> str:
    """Return as text how many hosts of which kinds have no node."""
    total = len(placement.node_ids) + len(placement.missing)
    kinds = Counter(map(_kind, placement.missing))
    counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{len(placement.missing)} of {total} hosts have no node ({counted})"


def _suits(host: HostPlace, node: Node) -> bool:
    if host.node and not node.is_called(host.node):
        return False
    # Where libvirt was not asked (on this machine alone), the host agent says if it is missing.
    return node.libvirt_usable is not False or not needs_libvirt(host)


def _fits(host: HostPlace, node: Node, there: Sequence[HostPlace]) -> bool:
    actors_bytes = actor_count(len(there) + 1, node.processors) * ACTOR_BYTES
    hosts_bytes = sum(other.node_memory_bytes for other in (*there, host))
    return actors_bytes + hosts_bytes <= node.available_bytes


def needs_libvirt(host: HostPlace) -> bool:
    """Return whether `host` is a logical host whose guests libvirt makes."""
    return host.logical is not None and host.driver is Driver.LIBVIRT


def _kind(host: HostPlace) -> str:
    if host.logical is None:
        return f"host agent on node {host.node}" if host.node else "host agent"
    return f"{host.driver} host of up to {format_size(host.node_memory_bytes)}"


def _in_order(
    moving: Sequence[HostPlace], node_ids: Mapping[str, str], nodes: Sequence[Node]
) -> Iterator[tuple[str, str]]:
    """Yield each moving host that has a node, with a node: hosts of one kind exchange their nodes,
    so that consecutive hosts are on the same node, and people read `host1-40`, not 40 names."""
    order = {node.node_id: i for i, node in enumerate(nodes)}
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for host in moving:
        if host.name in node_ids:
            kinds[_kind(host)].append(host.name)
    for names in kinds.values():
        yield from zip(
            names, sorted((node_ids[n] for n in names), key=order.__getitem__), strict=True
        )


def _offer(node: Node, hosts: int) -> str:
    memory = f"room for {hosts}, {format_size(node.available_bytes)} available"
    return f"{memory}, libvirt: {node.libvirt}" if node.libvirt else memory


def _names(nodes: Sequence[Node]) -> str:
    shown = [node.name for node in nodes[:_NODES_SHOWN]]
    return ", ".join(shown + ["..."] * (len(nodes) > _NODES_SHOWN))

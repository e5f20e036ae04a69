"""How each host of a spec is reached, and how much memory it takes of its node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hintfleet.net.addresses import socket_path
from hintfleet.settings import Driver
from orchestrator.spec.memory_needs import host_bytes
from orchestrator.spec.model import Spec, Timeouts
from orchestrator.spec.switchback import Switchback
from orchestrator.trial.host_process import LogicalHost
from orchestrator.trial.plan import host_names


@dataclass(frozen=True, kw_only=True)
class HostPlace:
    """How to reach a host: a logical host to start, or the address of a host agent.

    :ivar memory_needed_bytes: the size of the largest guest; the host's memory budget must not be
        less.
    :ivar node: the node that the host agent at `address` is on, by any of the node's names; empty
        if none was named.
    :ivar node_memory_bytes: the most memory that the host can take from its node; 0: not counted.
    :ivar switchback: of guests that are there already; None for guests that are made.
    :ivar tls_folder: the operator's TLS folder; empty for plain text. The actor reads it on its own
        node, because keys are not sent to other nodes.
    """

    name: str
    driver: Driver
    memory_needed_bytes: int
    timeouts: Timeouts
    logical: LogicalHost | None = None
    address: str = ""
    node: str = ""
    node_memory_bytes: int = 0
    tls_folder: str = ""
    switchback: Switchback | None = None


def host_places(
    spec: Spec, libvirt_uri: str, tls_folder: str, *, in_cluster: bool
) -> list[HostPlace]:
    """Return how each host of a spec is reached.

    :param in_cluster: whether the memory of nodes counts, and paths must not depend on the current
        folder. On this machine alone, `checks.machine_problem` has looked at all memory already,
        and the current folder of an actor is that of the command.
    """
    agents = spec.hosts.agents or (None,) * spec.hosts.number
    places = [
        HostPlace(
            name=name,
            driver=spec.driver,
            memory_needed_bytes=max((one.memory_bytes for one in spec.classes), default=0),
            timeouts=spec.timeouts,
            logical=_logical(spec, name, libvirt_uri),
            address=agent.address if agent else "",
            node=agent.node if agent else "",
            node_memory_bytes=host_bytes(spec) if in_cluster else 0,
            tls_folder=tls_folder,
            switchback=spec.switchback,
        )
        for name, agent in zip(host_names(spec), agents, strict=True)
    ]
    return [from_here(place) for place in places] if in_cluster else places


def from_here(place: HostPlace) -> HostPlace:
    """Return a place whose paths do not depend on the current folder: an actor in a cluster has
    another current folder than this process."""
    path = socket_path(place.address)
    return replace(
        place,
        address=f"unix:{path.absolute()}" if path else place.address,
        tls_folder=str(Path(place.tls_folder).absolute()) if place.tls_folder else "",
    )


def _logical(spec: Spec, name: str, libvirt_uri: str) -> LogicalHost | None:
    if spec.hosts.memory_bytes is None:
        return None
    return LogicalHost(
        name=name,
        memory_budget_bytes=spec.hosts.memory_bytes,
        driver=spec.driver,
        libvirt_uri=libvirt_uri,
        start_timeout_s=spec.timeouts.connect_s,
    )

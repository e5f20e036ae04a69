"""Tables of the nodes of a Ray cluster: what they could run, and where the hosts of a run ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from hintfleet.program import printable
from hintfleet.units import format_size
from orchestrator.cluster.nodes import Node
from orchestrator.results.store.reader import Run, StoredTrial
from orchestrator.view.figures import NO_FIGURE
from orchestrator.view.tables import table

_SOFTWARE = ("Python", "ray", "hintfleet")


def cluster_table(nodes: Sequence[Node]) -> Table:
    """Return a table with a row per node: what it has, and which guests it can run."""
    shown = table(("node", "has", "software"))
    shown.add_column("can run", overflow="fold")
    for node in nodes:
        shown.add_row(_name(node), _has(node), _software(node), _can_run(node))
    return shown


def _has(node: Node) -> Text:
    if node.problem:
        return Text(NO_FIGURE)
    of_memory = f"{format_size(node.available_bytes)} of {format_size(node.memory_bytes)}"
    return Text(f"{node.processors:g} processors\n{of_memory} available")


def _can_run(node: Node) -> Text:
    if node.problem:
        return Text(f"nothing: it {node.problem}", style="red")
    libvirt = "libvirt guests" if node.libvirt_usable else "no libvirt guests"
    detail = f"{libvirt}: {node.libvirt}" if node.libvirt else libvirt
    return Text("embedded guests\n", style="green").append(detail, style="")


def places_table(run: Run, trials: Iterable[StoredTrial]) -> Table:
    """Return a table with a row per node that hosts of the run were on, in any attempt at a trial.

    A machine has one row even if it had several node ids, unless its name, address or environment
    changed: when a run on this machine alone is resumed, its new private cluster gives the machine
    another id.
    """
    hosts = hosts_by_node(trials)
    machines: dict[object, tuple[Node, set[str]]] = {}
    for node_id, node in run.nodes.items():
        key = (node.name, node.address, tuple(node.environment.items()))
        machines.setdefault(key, (node, set()))[1].update(hosts.get(node_id, ()))
    shown = table(("node",))
    for column in ("hosts", "machine", "software"):
        shown.add_column(column, overflow="fold")
    for node, names in machines.values():
        facts = node.environment
        machine = [facts[name] for name in ("processors", "memory") if name in facts]
        shown.add_row(_name(node), short_list(names), Text("\n".join(machine)), _software(node))
    return shown


def hosts_by_node(trials: Iterable[StoredTrial]) -> Mapping[str, Sequence[str]]:
    """Return the hosts that were on each node, by the node's id."""
    found: dict[str, dict[str, None]] = {}
    for trial in trials:
        for host, node_id in trial.places.items():
            found.setdefault(node_id, {})[host] = None
    return {node_id: list(hosts) for node_id, hosts in found.items()}


def short_list(hosts: Iterable[str]) -> str:
    """Return names of hosts (plan.host_names) as text: `host1-3, host7`."""
    numbers = sorted(int(host.removeprefix("host")) for host in hosts)
    parts = []
    # For consecutive numbers, number minus index is the same.
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        parts.append(f"host{run[0]}" if len(run) == 1 else f"host{run[0]}-{run[-1]}")
    return ", ".join(parts) or NO_FIGURE


def _name(node: Node) -> Text:
    return Text("\n".join(dict.fromkeys((printable(node.name), node.address))))


def _software(node: Node) -> Text:
    facts = node.environment
    lines = [f"{name} {facts[name]}" for name in _SOFTWARE if facts.get(name)]
    return Text("\n".join([*lines, facts["kernel"]] if "kernel" in facts else lines))

"""Nodes of a Ray cluster: what is known of each, and why hosts cannot run there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hintfleet.errors import HintfleetError, Refused

_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine or container of a Ray cluster, as it was when it was asked.

    :ivar node_id: Ray's id.
    :ivar name: the name from `ray start --node-name`; without that, the hostname, or the address if
        the node could not be asked or did not answer.
    :ivar address: the IP address at which other nodes reach it.
    :ivar environment: versions and hardware as text, by name (machine.environment); of a node with
        a problem only some versions and the kernel, or nothing.
    :ivar processors: how many processors actors and guests may use there.
    :ivar memory_bytes: the memory that they may use; `available_bytes`: the part of it that was
        not in use. These two and `processors` are 0 if there is a problem.
    :ivar libvirt: what libvirt guests would run on, or why they cannot run; empty if not asked.
    :ivar libvirt_usable: None if not asked.
    :ivar problem: why no host can run there; empty if hosts can.
    :ivar is_silent: whether the problem is that there is no answer: it did not come in time, or the
        question was lost.
    """

    node_id: str
    name: str
    address: str
    hostname: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    processors: float = 0.0
    memory_bytes: int = 0
    available_bytes: int = 0
    libvirt: str = ""
    libvirt_usable: bool | None = None
    problem: str = ""
    is_silent: bool = False

    @property
    def label(self) -> str:
        """Its name, and its address if that is another text."""
        return self.name if self.name == self.address else f"{self.name} ({self.address})"

    def is_called(self, name: str) -> bool:
        """Return whether `name` is one of its names: name, hostname, address or id."""
        return name in (self.name, self.hostname, self.address, self.node_id)


def node_of(
    node_id: str,
    name: str,
    address: str,
    answer: Mapping[str, Any] | str | None,
    wanted: Mapping[str, str],
) -> Node:
    """Return a node from what it answered.

    :param name: as Ray knows it; without `ray start --node-name`, Ray uses the address.
    :param answer: from `node_probe.look`; a text that says why the node cannot be asked; None if
        there is no answer (`Node.is_silent`).
    :param wanted: the versions of this machine (`node_probe.versions`).
    """
    if answer is None or isinstance(answer, str):
        return Node(
            node_id=node_id,
            name=name,
            address=address,
            problem=answer or "did not answer in time",
            is_silent=answer is None,
        )
    facts = dict(answer)
    missing = facts.pop("missing")
    hostname = facts["hostname"]
    return Node(
        node_id=node_id,
        name=name if name != address else hostname,
        address=address,
        problem=_problem(facts["environment"], missing, wanted),
        **facts,
    )


def _problem(found: Mapping[str, str], missing: Sequence[str], wanted: Mapping[str, str]) -> str:
    differ = [
        f"has {name} {found[name]}, here it is {version}" if found[name] else f"has no {name}"
        for name, version in wanted.items()
        if found[name] != version
    ]
    return ", ".join(differ) or (f"lacks {', '.join(missing)}" if missing else "")


def unusable_error(nodes: Sequence[Node], wanted: Mapping[str, str]) -> HintfleetError:
    """Return the error for a cluster in which these nodes have problems.

    :param wanted: this machine's `node_probe.versions`, which all nodes must have.
    """
    shown = [f"{node.label}: {node.problem}" for node in nodes[:_PROBLEMS_SHOWN]]
    if len(nodes) > _PROBLEMS_SHOWN:
        shown.append(f"and {len(nodes) - _PROBLEMS_SHOWN} more nodes")
    return Refused(
        "\n  ".join(("nodes of the Ray cluster cannot run hosts:", *shown)),
        hint=f"install there Python {wanted['Python']}, ray=={wanted['ray']} and "
        f"'hintfleet[embedded,orchestrator]=={wanted['hintfleet']}', and start Ray again; "
        "`hintfleet cluster` shows all nodes",
    )

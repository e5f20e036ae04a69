"""Shows the domains of a host, and what keeps each from being hinted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from hintfleet.program import printable
from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.view.tables import table


def domain_table(domains: Sequence[host_pb2.Domain]) -> RenderableType:
    """Return a table with a row for each obstacle of each domain, or a sentence if there is no
    domain."""
    if not domains:
        return Text("this host's libvirt has no domains")
    shown = table(("domain", "in the way", "change"), ("memory",))
    for domain in domains:
        state = "" if domain.running else "\nshut off"
        name = Text(printable(domain.name) + state)
        size = format_size(domain.memory_bytes)
        for obstacle in domain.obstacles:
            shown.add_row(name, Text(printable(obstacle.what)), Text(obstacle.change), size)
            name, size = Text(), ""
        if not domain.obstacles:
            shown.add_row(name, Text("nothing", style="green"), Text(), size)
    return shown

"""The command `hintfleet cluster`."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict

import click

from orchestrator.commands.options import (
    address_option,
    check_names,
    data_dir_or_default,
    libvirt_uri_option,
    output_option,
)

_EPILOG = """\b
Examples:
  hintfleet cluster                            on a node of the cluster
  hintfleet cluster --address 10.0.0.1:6379 -o json

\b
The exit code is 1 if a node could run nothing, or if no cluster answers. What Ray
itself writes goes to hintfleet/logs/cluster.log in the XDG data folder.
docs/cluster.md says how to make a cluster.
"""


@click.command(epilog=_EPILOG, short_help="Show what the nodes of a Ray cluster could run.")
@address_option
@libvirt_uri_option
@output_option
def cluster(address: str | None, libvirt_uri: str, output_format: str) -> int:
    """Show what the nodes of a Ray cluster could run.

    For each node: its name and address, processors and memory, the versions of Python, Ray and
    hintfleet, and whether it can run libvirt guests; or why it can run nothing. Each node is
    asked by a process there. This machine must be one of the nodes. Without --address and
    RAY_ADDRESS, the cluster is that of this machine (`auto`).
    """
    from hintfleet.errors import InvalidInput
    from orchestrator.cluster.ray_actors import Cluster
    from orchestrator.cluster.ray_cluster import cluster_address
    from orchestrator.cluster.stray_output import stray_output_to
    from orchestrator.commands.output import emit
    from orchestrator.view.node_tables import cluster_table

    if address is None and not os.environ.get("RAY_ADDRESS"):
        address = "auto"
    chosen = cluster_address(address, os.environ)
    if not chosen.value:
        raise InvalidInput(
            "`local` is no cluster: there are no nodes but this machine",
            hint="`hintfleet doctor` shows what this machine could run",
        )
    check_names()
    log = data_dir_or_default(None) / "logs" / "cluster.log"
    with stray_output_to(log), closing(Cluster(chosen)) as joined:
        joined.open()
        nodes = joined.nodes(libvirt_uri)
    emit({"nodes": [asdict(node) for node in nodes]}, output_format, lambda: cluster_table(nodes))
    return 1 if any(node.problem for node in nodes) else 0

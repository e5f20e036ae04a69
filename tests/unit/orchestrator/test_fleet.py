"""A fleet whose nodes do not answer: it does not wait for ever. Only Ray is replaced here, because
no test can make a node of Ray silent for sure."""

import pytest

from hintfleet.errors import Refused
from orchestrator.cluster.fleet import Fleet
from orchestrator.cluster.nodes import Node, node_of
from orchestrator.cluster.ray_cluster import cluster_address
from tests.unit.orchestrator.test_placement import logical


class _Silent:
    """Stands for `Cluster`: its only node is alive, and does not answer."""

    def __init__(self, is_private: bool) -> None:
        self.is_private = is_private

    def open(self) -> None:
        """Do nothing: there is no cluster to join."""

    def check(self) -> None:
        """Do nothing: the cluster is always there."""

    def nodes(self, libvirt_uri: str | None) -> list[Node]:
        return [node_of("1", "quiet", "10.0.0.1", None, {})]

    def close(self, actors: object = ()) -> None:
        """Do nothing: there is nothing to leave."""


@pytest.mark.parametrize("address", ["local", "10.0.0.9:6379"])
def test_silent_nodes_are_waited_for_only_as_long_as_allowed(address: str) -> None:
    said: list[str] = []
    fleet = Fleet(cluster_address(address, {}), logical(2), wait_s=0.1, say=said.append)
    fleet._cluster = _Silent(fleet._cluster.is_private)  # type: ignore[assignment]
    with pytest.raises(Refused, match="2 of 2 hosts have no node"), fleet:
        pass
    assert "node quiet (10.0.0.1) did not answer in time: no host runs there" in said

"""A Ray cluster as a user starts one: a head and more nodes, with `ray start` on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.agents import HANG_S, wait_until
from tests.support.lab import Lab, parent_pid

_RAY = Path(sys.executable).with_name("ray")
_ENVIRONMENT = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",  # have `ray start` write its output at once: _is_up reads it
    # The nodes listen at an address that other machines can reach, so clients need a token.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
}
_NODE = (
    *("--block", "--disable-usage-stats", "--num-cpus=1", "--object-store-memory=83886080"),
    *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
)


_WAIT_FOR_NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while ray.cluster_resources().get("CPU", 0) < int(sys.argv[2]):
    time.sleep(0.1)
"""


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running cluster.

    :ivar environment: the variables with which a program uses the cluster.
    :ivar raylets: process ids, the head's first.
    """

    environment: dict[str, str]
    raylets: list[int]

    def actors(self, lab: Lab) -> list[int]:
        """Return the number of our actors on each node, in the order of `raylets`."""
        parents = list(map(parent_pid, lab.find("ray::_HostActor")))
        return [parents.count(raylet) for raylet in self.raylets]


@contextmanager
def ray_cluster(lab: Lab, nodes: int) -> Iterator[RayCluster]:
    """Run a cluster until the block ends; its processes carry the lab's mark."""
    port = _free_port()
    head: tuple[str, ...] = ("--head", f"--port={port}", f"--temp-dir={lab.temporary}/ray")
    head = (*head, "--include-dashboard=false", f"--ray-client-server-port={_free_port()}")
    raylets: list[int] = []
    with ExitStack() as stack:
        for arguments in (head, *[(f"--address=127.0.0.1:{port}",)] * (nodes - 1)):
            log = lab.folder / f"ray-node-{len(raylets)}.log"
            stack.enter_context(_node(arguments, lab.environment | _ENVIRONMENT, log))
            raylets += set(lab.find("raylet/raylet ")) - set(raylets)
        # Wait until the head's scheduler knows all nodes, which may be later than their start.
        # Else all actors could be placed on the head, and a test that kills an actor on another
        # node would not find one.
        counted = [sys.executable, "-c", _WAIT_FOR_NODES, f"127.0.0.1:{port}", str(nodes)]
        subprocess.run(counted, env=lab.environment | _ENVIRONMENT, check=True, timeout=HANG_S)
        yield RayCluster(
            environment=_ENVIRONMENT | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, raylets=raylets
        )


@contextmanager
def _node(arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(_RAY), "start", *arguments, *_NODE], env=environment, stdout=file, stderr=file
        )
    try:
        wait_until(lambda: process.poll() is not None or _is_up(log), f"a node of Ray: {log}")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def _is_up(log: Path) -> bool:
    return "block forever" in log.read_text()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

"""A Ray cluster as a user starts one: a head and more nodes, with `ray start` on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.agents import HANG_S, wait_until
from tests.support.lab import Lab, parent_pid

TINY = """\
name: tiny
driver: embedded
hosts: {count: 3, memory: 256MiB}
guests: {per_host: 1, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB, for: 6s}
    - {free: 75%, for: 500ms}
arms:
  - {name: none, method: none}
repetitions: 2
"""
"""A spec whose trials take some seconds, so that something can happen meanwhile."""

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


@dataclass(kw_only=True)
class RayCluster:
    """A running cluster.

    :ivar prefixes: by node, words to put before its commands, such as `ip netns exec NAME`.
    :ivar raylets: process ids by the name of the node; the first is the head.
    """

    lab: Lab
    head_address: str
    raylets: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _stack: ExitStack

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a program uses the cluster."""
        return _ENVIRONMENT | {"RAY_ADDRESS": self.head_address}

    def add(
        self,
        name: str,
        *options: str,
        python: str = sys.executable,
        prefix: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a node, the head if it is the first; return when the cluster knows it.

        :param options: more options of `ray start`.
        :param python: the Python that runs Ray on this node.
        """
        where = self._head_options() if not self.raylets else (f"--address={self.head_address}",)
        command = (*prefix, python, "-m", "ray.scripts.scripts", "start", f"--node-name={name}")
        variables = self.lab.environment | _ENVIRONMENT | dict(environment or {})
        log = self.lab.folder / f"ray-{name}.log"
        before = set(self.lab.find("raylet/raylet "))
        self._stack.enter_context(_node((*command, *where, *_NODE, *options), variables, log))
        (self.raylets[name],) = set(self.lab.find("raylet/raylet ")) - before
        self.prefixes[name] = prefix
        self._wait_until_known()

    def _head_options(self) -> tuple[str, ...]:
        return (
            *("--head", f"--port={self.head_address.rpartition(':')[2]}"),
            *(f"--temp-dir={self.lab.temporary}/ray", "--include-dashboard=false"),
            f"--ray-client-server-port={_free_port()}",
        )

    def _wait_until_known(self) -> None:
        # Wait until the head's scheduler knows all nodes: that may be later than their start.
        head = next(iter(self.prefixes.values()))
        script = (sys.executable, "-c", _WAIT_FOR_NODES, self.head_address, str(len(self.raylets)))
        variables = self.lab.environment | _ENVIRONMENT
        subprocess.run([*head, *script], env=variables, check=True, timeout=HANG_S)

    def kill(self, name: str) -> None:
        """Kill the raylet of a node. The processes that it had started end as well."""
        os.kill(self.raylets.pop(name), signal.SIGKILL)

    def actors(self) -> dict[str, int]:
        """Return the number of our actors on each node."""
        parents = list(map(parent_pid, self.lab.find("ray::_HostActor")))
        return {name: parents.count(raylet) for name, raylet in self.raylets.items()}


@contextmanager
def ray_cluster(lab: Lab, *nodes: str, head_address: str = "") -> Iterator[RayCluster]:
    """Run a cluster until the block ends; its processes carry the lab's mark.

    :param nodes: the names of the nodes; the first is the head.
    :param head_address: HOST:PORT; on loopback if empty.
    """
    with ExitStack() as stack:
        address = head_address or f"127.0.0.1:{_free_port()}"
        cluster = RayCluster(lab=lab, head_address=address, _stack=stack)
        for name in nodes:
            cluster.add(name)
        yield cluster


def python_without(folder: Path, *packages: str) -> str:
    """Make a virtual environment in `folder` with all packages of this one, except those whose
    names begin with one of `packages`; return the Python of the new one."""
    venv.create(folder, with_pip=False, symlinks=True)
    (theirs,) = folder.glob("lib/python*/site-packages")
    (ours,) = Path(sys.executable).parents[1].glob("lib/python*/site-packages")
    for entry in ours.iterdir():
        if not entry.name.lower().startswith(packages):
            (theirs / entry.name).symlink_to(entry)
    return str(folder / "bin/python")


@contextmanager
def _node(command: tuple[str, ...], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
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

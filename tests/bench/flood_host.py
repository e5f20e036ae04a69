"""A host agent with many guests that have RAM files and no processes, for flood.py and sessions.py.

The servers, the registry, the books and the punches are the real ones. The benchmarks act for the
guests, because each real embedded guest is a process: that takes 16 MiB of memory of its own, and
half a second to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile

from hintfleet.units import GIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.memory.ram import GuestRam, Segment
from host_agent.registry import Registry
from host_agent.server import Settings, serving
from host_agent.session.stream import Stream
from host_agent.threads import keep_latency_steady

_TRIAL = "flood"
GUEST_BYTES = 1 * GIB
"""Address space of each guest; a neighbour uses four pages of it, and a Shredder half."""


class _Guest:
    """A guest that has a RAM file, but no process."""

    pid = 0
    domain = ""
    hypervisor = ""
    handle = ""
    door = None
    balloon = None

    def __init__(self, size_bytes: int) -> None:
        self.fd = os.memfd_create("flood-ram")
        os.truncate(self.fd, size_bytes)
        segment = Segment(pfn=0, page_count=size_bytes // PAGE_BYTES, fd=self.fd, offset_bytes=0)
        self.ram = GuestRam([segment])

    def evidence(self) -> str:
        return ""

    def close(self) -> None:
        self.ram.close()


class _Driver:
    def create(self, request: GuestRequest) -> _Guest:
        return _Guest(request.spec.memory_bytes)

    def close(self) -> None:
        pass


async def _make(registry: Registry, name: str) -> dict[str, str]:
    """Make a guest; return what a client needs to act for it: its UUID, its token and the path of
    its RAM file."""
    spec = host_pb2.GuestSpec(
        driver=host_pb2.EMBEDDED, memory_bytes=GUEST_BYTES, method=host_pb2.NONE
    )
    making = asyncio.create_task(registry.create(name, _TRIAL, spec))
    while not any(guest.name == name and guest.running for guest in registry.guests):
        await asyncio.sleep(0)
    registry.get(name).sessions.attach_workload(Stream())  # `create` waits for this stream
    guest = await making
    running = guest.running
    assert isinstance(running, _Guest)
    ram = f"/proc/{os.getpid()}/fd/{running.fd}"
    return {"uuid": guest.uuid, "token": guest.token, "ram": ram}


async def main(guests: int) -> None:
    """Print the address and the guests on stdout, then serve until stdin ends."""
    keep_latency_steady()
    # Raise the soft limit of open files to the hard limit, as hintfleet-host does.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="hf-flood-") as folder:
        settings = Settings(
            name="flood",
            listen=f"unix:{folder}/host.sock",
            guest_listen="127.0.0.1:0",
            memory_budget_bytes=guests * GUEST_BYTES,
            libvirt_uri="test:///default",
        )
        async with serving(settings) as served:
            served.registry.drivers = {host_pb2.EMBEDDED: _Driver()}  # type: ignore[dict-item]
            served.registry.trials.open_watch(_TRIAL)
            made = [await _make(served.registry, f"g{n}") for n in range(guests)]
            print(json.dumps({"address": served.guest, "guests": made}), flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

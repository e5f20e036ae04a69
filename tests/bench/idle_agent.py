"""The agent of an idle real guest with the hugetlb isolator, run as a process on this machine.

    python -m tests.bench.idle_agent HOST:PORT

Its code is an agent's, and it reads real files of /proc at each poll; only its huge page pool is a
fake one, which stays empty. But this machine is not as idle as such a guest. So the threshold is
too high for any pass to begin, and the agent is told that free memory never changes.
"""

from __future__ import annotations

import asyncio
import sys

import guest_agent.__main__  # noqa: F401 - what an agent imports
from guest_agent.agent import _connect
from guest_agent.isolation.hugetlb import HugetlbIsolator
from guest_agent.isolation.hugetlb_pool import HugetlbPool
from guest_agent.memory.kernel import FreeLists
from guest_agent.memory.memory_use import KernelMemoryUse
from guest_agent.procfs import mem_free_bytes, mem_total_bytes
from guest_agent.session import HelloFacts, HintingSession
from hintfleet.agent_config import AgentConfig
from hintfleet.ranges import EMPTY, RangeSet

_CHUNK_ORDER = 9


class _UnusedPool(HugetlbPool):
    """A huge page pool that is never mounted, and stays empty."""

    def open(self) -> RangeSet:
        self._free_lists = FreeLists(_CHUNK_ORDER)
        return EMPTY


async def _run(server: str) -> None:
    channel, identity = _connect(AgentConfig(server=server, guest_uuid="", token=""))
    isolator = HugetlbIsolator(_UnusedPool(), threshold_chunks=1 << 40, zeroing=True)
    facts = HelloFacts(
        identity=identity,
        boot_id="",
        chunk_order=_CHUNK_ORDER,
        tracker="bitmap",
        most_memory_bytes=mem_total_bytes(),
    )
    memory_use = KernelMemoryUse(_CHUNK_ORDER)
    await HintingSession(channel, isolator, facts, _read_and_forget, memory_use).run()


def _read_and_forget() -> int:
    mem_free_bytes()
    return 0


asyncio.run(_run(sys.argv[1]))

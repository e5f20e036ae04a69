"""Puts an agent together from its configuration, and runs it."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Coroutine
from typing import Any

from grpc import aio

from guest_agent.config import Config
from guest_agent.isolation import Isolator
from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.procfs import boot_id, init_on_alloc, mem_free_bytes, mem_total_bytes
from guest_agent.session import HelloFacts, HintingSession
from guest_agent.workload import Workload
from guest_agent.workload_client import serve_workload
from guest_agent.workload_memory import AnonymousSource, BuddySource
from hintfleet.errors import InvalidInput
from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # One connection a subchannel: nothing is shared with other channels of this process.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def run(config: Config) -> None:
    """Run the agent until it is stopped or refused.

    :raises HintfleetError: isolation is not possible here, or the host refused this agent.
    """
    asyncio.run(_run_embedded(config) if config.memory == "embedded" else _run_in_guest(config))


def _connect(config: Config) -> tuple[aio.Channel, pb.Identity]:
    """A channel to the host agent, on the running event loop, and who speaks on it."""
    channel = aio.insecure_channel(config.server, options=_CHANNEL_OPTIONS)
    return channel, pb.Identity(guest_uuid=config.guest_uuid, token=config.token)


async def _until_one_fails(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of them; none ends but by an error, which is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _run_embedded(config: Config) -> None:
    """A whole guest in this process: the agent, and its workload beside it."""
    if config.ram_fd < 0 or config.memory_bytes <= 0 or config.memory_bytes % PAGE_BYTES:
        raise InvalidInput("an embedded guest needs ram_fd and memory_bytes, in whole pages")
    ram = mmap.mmap(config.ram_fd, config.memory_bytes)
    pages = config.memory_bytes // PAGE_BYTES
    allocator = BuddyAllocator(
        [ZoneSpec(name="Normal", present=RangeSet([(0, pages)]))], chunk_order=config.chunk_order
    )
    # An embedded guest boots with every start of its process.
    boot = f"{boot_id()}-{os.getpid()}-{time.monotonic_ns()}"
    workload = Workload(BuddySource(allocator, ram))
    channel, identity = _connect(config)
    serving = serve_workload(channel, workload, identity, boot)
    if config.method == "none":
        await serving
        return
    tracker = config.tracker or "bitmap"
    isolator = EmbeddedIsolator(
        allocator, tracker=tracker, threshold_chunks=config.threshold_chunks
    )
    facts = HelloFacts(
        identity=identity, boot_id=boot, chunk_order=config.chunk_order, tracker=tracker
    )
    session = HintingSession(
        channel, isolator, facts, lambda: allocator.free_page_count * PAGE_BYTES
    )
    await _until_one_fails(session.run(), serving)


async def _run_in_guest(config: Config) -> None:
    """The agent of a real guest: the workload is a process of its own, so that its
    memory and CPU time are not the agent's."""
    if config.method == "none":
        await _serve_anonymous_workload(config)
        return
    channel, identity = _connect(config)
    isolator, tracker = _isolator(config)
    child = None
    if config.workload:
        child = subprocess.Popen(
            [sys.executable, "-m", "guest_agent", "--workload-only", "--config", "-"],
            stdin=subprocess.PIPE,
            text=True,
        )
        if child.stdin is not None:  # always: Popen was asked for a pipe
            child.stdin.write(config.to_json() + "\n")
            child.stdin.flush()
    try:
        facts = HelloFacts(
            identity=identity,
            boot_id=boot_id(),
            chunk_order=config.chunk_order,
            tracker=tracker,
        )
        await HintingSession(channel, isolator, facts, mem_free_bytes).run()
    finally:
        if child is not None:
            child.kill()
            child.wait()


def _isolator(config: Config) -> tuple[Isolator, str]:
    """The isolator of a real guest, and the name of the tracker that it comes with.

    Imported late: none needs the others.
    """
    if config.isolator == "hugetlb":
        from guest_agent.isolation.hugetlb import HugetlbIsolator
        from guest_agent.isolation.hugetlb_pool import HugetlbPool

        zeroing = init_on_alloc()
        print(f"hintfleet-guest: init_on_alloc={int(zeroing)}", file=sys.stderr, flush=True)
        threshold = config.threshold_chunks
        isolator = HugetlbIsolator(HugetlbPool(), threshold_chunks=threshold, zeroing=zeroing)
        return isolator, "bitmap"
    from guest_agent.isolation.kmod import KmodIsolator

    return KmodIsolator(), "reported"


def run_workload_only(config: Config) -> None:
    """The workload of a real guest, without hinting: what the agent starts beside itself."""
    # The kernel is to kill the workload, not the agent, if the guest runs out of memory.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    asyncio.run(_serve_anonymous_workload(config))


async def _serve_anonymous_workload(config: Config) -> None:
    channel, identity = _connect(config)
    workload = Workload(AnonymousSource(mem_total_bytes()))
    await serve_workload(channel, workload, identity, boot_id())

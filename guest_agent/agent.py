"""Builds what runs in a guest from its configuration, and runs it.

An embedded guest is one process (`run`), which runs the workload and, unless the method is none,
hints. In a real guest, `run` hints and runs no workload: the workload is a process of its own
(`run_workload_only`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any

from grpc import ChannelConnectivity, aio

from guest_agent.isolation.isolator import Isolator
from guest_agent.procfs import (
    boot_id,
    init_on_alloc,
    init_on_free,
    mem_free_bytes,
    mem_total_bytes,
)
from guest_agent.session import HelloFacts, HintingSession
from hintfleet.agent_config import AgentConfig, Memory
from hintfleet.errors import InvalidInput, Refused, TransientError
from hintfleet.logs import fields
from hintfleet.net.addresses import is_unix
from hintfleet.net.channels import open_aio_channel
from hintfleet.ranges import RangeSet
from hintfleet.settings import HUGE_PAGE_ORDER, IsolatorKind, Method
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

_log = logging.getLogger("hintfleet.guest")

_FINISH_TIMEOUT_S = 1.0
"""How long at most the agent of a real guest waits after SIGTERM for acks of what is in flight."""

_TOLD_AFTER_S = 10.0
"""How long the link to the host agent may be down until the log says so."""

_NICENESS = 10
"""Of the agent in a real guest: while the guest's work runs, the agent gets little CPU time, but it
is not starved. When it was as nice as the work, each of its wakes made an allocation of the work
wait."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC shares connections between channels of a process with the same target and options
    # (GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL in grpc/impl/channel_arg_names.h). With this option, our
    # channel shares its connection with no other channel.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this is the timeout of one attempt to connect (grpc: min_connect_timeout in
    # subchannel.cc, doc/connection-backoff.md). A guest that gets little CPU needs seconds.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def run(config: AgentConfig) -> None:
    """Run the agent until it is stopped or refused, or finds no host agent for `orphan_after_s`.

    On SIGTERM, the agent of a real guest begins no new batch and waits for the acks of all batches
    in flight, one second at most. Ranges without an ack stay isolated, for the next agent (I4).

    :raises HintfleetError: the configuration cannot be used, isolation is not possible here, the
        host refused this agent, or there was no host agent for too long.
    """
    with contextlib.suppress(_Terminated):
        embedded = config.memory is Memory.EMBEDDED
        asyncio.run(_run_embedded(config) if embedded else _run_in_guest(config))


class _Terminated(Exception):
    """The agent was asked to end by SIGTERM."""


async def _end_when_terminated(session: HintingSession) -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await asked.wait()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FINISH_TIMEOUT_S):
            await session.finish()
    raise _Terminated


def _connect(config: AgentConfig) -> tuple[aio.Channel, pb.Identity]:
    """Open a channel to the host agent on the running event loop.

    Return the channel and the identity with which this guest authenticates.

    :raises InvalidInput: the TLS folder cannot be used.
    """
    identity = pb.Identity(guest_uuid=config.guest_uuid, token=config.token)
    credentials = None
    if config.tls_folder and not is_unix(config.server):
        from hintfleet.net.tls import Tls  # imported only for TLS: it takes memory

        credentials = Tls.read(config.tls_folder, server=False).for_client()
    return open_aio_channel(config.server, credentials, _CHANNEL_OPTIONS), identity


async def _watch_link(channel: aio.Channel, config: AgentConfig) -> None:
    """Watch the link to the host agent, until cancelled or until it is down for `orphan_after_s`
    (0: for ever). Log if it is down for 10 s.

    :raises TransientError: there was no host agent for `orphan_after_s` seconds.
    """
    # A guest of a host agent with --state outlives that host agent, and then only the next one can
    # end it. If there is no next one, this error ends the guest, which would otherwise run for
    # ever.
    after_s = config.orphan_after_s
    while True:
        try:
            async with asyncio.timeout(after_s or None):
                await _wait_for_link(channel, config.server)
        except TimeoutError:
            raise TransientError(f"no host agent for {after_s} s: this guest ends") from None
        await channel.wait_for_state_change(ChannelConnectivity.READY)


async def _wait_for_link(channel: aio.Channel, server: str) -> None:
    # gRPC tries for ever, and says nothing: not that the address is wrong, nor that a firewall or a
    # certificate of another CA is in the way.
    try:
        async with asyncio.timeout(_TOLD_AFTER_S):
            await _wait_for_state(channel, ChannelConnectivity.READY)
    except TimeoutError:
        _log.warning("host agent cannot be reached", extra=fields(server=server))
        await _wait_for_state(channel, ChannelConnectivity.READY)
        _log.info("host agent reached", extra=fields(server=server))


async def _wait_for_state(channel: aio.Channel, wanted: ChannelConnectivity) -> None:
    while (state := channel.get_state()) is not wanted:
        await channel.wait_for_state_change(state)


async def _until_one_fails(*work: Coroutine[Any, Any, None]) -> None:
    """Run all coroutines until one raises, and raise that error; return if all have returned.

    After an error the other coroutines still run; the end of the event loop cancels them.
    """
    tasks = [asyncio.create_task(one) for one in work]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _run_embedded(config: AgentConfig) -> None:
    """Run an embedded guest in this process: its workload, and hinting unless the method is `none`.

    :raises InvalidInput: the configuration has no RAM file, or its memory is not whole pages.
    """
    # Imports inside functions, here and below: each kind of guest loads only the modules that it
    # needs, which saves memory.
    import mmap

    from guest_agent.isolation.embedded import EmbeddedIsolator
    from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
    from guest_agent.workload.client import serve_workload
    from guest_agent.workload.memory import BuddyPlugs, BuddySource
    from guest_agent.workload.workload import Workload

    if config.ram_fd < 0 or config.memory_bytes <= 0 or config.memory_bytes % PAGE_BYTES:
        raise InvalidInput("an embedded guest needs ram_fd and memory_bytes, in whole pages")
    ram = mmap.mmap(config.ram_fd, max(config.memory_bytes, config.max_memory_bytes))
    if config.chunk_order >= HUGE_PAGE_ORDER:
        # Ask for huge pages, as QEMU does for its guests: where the host lets shared memory have
        # them (shmem_enabled), a refault of 2 MiB then costs one page fault, not 512.
        with contextlib.suppress(OSError):  # raised by a kernel without huge pages
            ram.madvise(mmap.MADV_HUGEPAGE)
    pages = config.memory_bytes // PAGE_BYTES
    allocator = BuddyAllocator(
        [ZoneSpec(name="Normal", present=RangeSet([(0, pages)]))], chunk_order=config.chunk_order
    )
    # Each start of this process is a boot of the embedded guest, and needs its own boot id.
    boot = f"{boot_id()}-{os.getpid()}-{time.monotonic_ns()}"
    workload = Workload(BuddySource(allocator, ram), BuddyPlugs(allocator))
    channel, identity = _connect(config)
    serving = serve_workload(channel, workload, identity, boot)
    link = _watch_link(channel, config)
    if config.method is Method.NONE:
        await _until_one_fails(serving, link)
        return
    isolator = EmbeddedIsolator(
        allocator, tracker=config.tracker, threshold_chunks=config.threshold_chunks
    )
    facts = HelloFacts(
        identity=identity,
        boot_id=boot,
        chunk_order=config.chunk_order,
        tracker=config.tracker,
        most_memory_bytes=max(config.memory_bytes, config.max_memory_bytes),
    )
    session = HintingSession(
        channel,
        isolator,
        facts,
        lambda: allocator.free_page_count * PAGE_BYTES,
        allocator.memory_use,
    )
    await _until_one_fails(session.run(), serving, link)


async def _run_in_guest(config: AgentConfig) -> None:
    """Run the agent of a real guest, at a lower CPU priority (nice) than the guest's work.

    The workload runs in another process (--workload-only), so that its memory and CPU time are not
    counted as the agent's, and so that it survives the agent.

    :raises InvalidInput: the method is `none`.
    """
    if config.method is Method.NONE:
        raise InvalidInput(
            "method none: there is nothing to hint", hint="hintfleet-guest --workload-only"
        )
    from guest_agent.memory.memory_use import KernelMemoryUse

    os.nice(_NICENESS)
    channel, identity = _connect(config)
    facts = HelloFacts(
        identity=identity,
        boot_id=boot_id(),
        chunk_order=config.chunk_order,
        tracker=config.tracker,
        most_memory_bytes=max(mem_total_bytes(), config.max_memory_bytes),
    )
    memory_use = KernelMemoryUse(config.chunk_order)
    session = HintingSession(channel, _isolator(config), facts, mem_free_bytes, memory_use)
    await _until_one_fails(
        session.run(),
        _end_when_terminated(session),
        _watch_link(channel, config),
    )


def _isolator(config: AgentConfig) -> Isolator:
    """Return the isolator of a real guest: hugetlb if the configuration names it, else kmod.

    Imports only the one that is needed.

    :raises Refused: the isolator is hugetlb, and the kernel zeroes pages when they are freed.
    """
    if config.isolator is IsolatorKind.HUGETLB:
        from guest_agent.isolation.hugetlb import HugetlbIsolator
        from guest_agent.isolation.hugetlb_pool import HugetlbPool

        if init_on_free():
            raise Refused(
                "this kernel zeroes pages as they are freed (init_on_free=1): memory that hugetlb"
                " has hinted would become resident again",
                hint="boot with init_on_free=0, or use the kmod isolator",
            )
        zeroing = init_on_alloc()
        _log.info("isolating by the hugetlb pool", extra=fields(init_on_alloc=int(zeroing)))
        threshold = config.threshold_chunks
        return HugetlbIsolator(HugetlbPool(), threshold_chunks=threshold, zeroing=zeroing)
    from guest_agent.isolation.kmod import KmodIsolator

    return KmodIsolator(chunk_order=config.chunk_order)


def run_workload_only(config: AgentConfig) -> None:
    """Run the workload of a real guest, without hinting."""
    # If the guest runs out of memory, its kernel should kill the workload before the agent
    # (-500), but after processes that set 1000, such as stress-ng's workers: stress-ng restarts
    # its workers, but nobody restarts the workload.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
    asyncio.run(_serve_anonymous_workload(config))


async def _serve_anonymous_workload(config: AgentConfig) -> None:
    from guest_agent.memory.blocks import MemoryBlocks
    from guest_agent.workload.client import serve_workload
    from guest_agent.workload.file_cache import FileCache
    from guest_agent.workload.memory import AnonymousSource
    from guest_agent.workload.programs import Programs
    from guest_agent.workload.workload import GuestSystem, Workload

    channel, identity = _connect(config)
    source = AnonymousSource(max(mem_total_bytes(), config.max_memory_bytes))
    system = GuestSystem(cache=FileCache(), programs=Programs(config.programs))
    workload = Workload(source, MemoryBlocks(), system)
    serving = serve_workload(channel, workload, identity, boot_id())
    await _until_one_fails(serving, _watch_link(channel, config))

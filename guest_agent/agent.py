"""Puts an agent together from its configuration, and runs it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Thread

import grpc

from guest_agent.config import Config
from guest_agent.isolation import Isolator
from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.procfs import boot_id, mem_available_bytes, mem_free_bytes
from guest_agent.session import HelloFacts, HintingSession
from guest_agent.workload import Source, Workload
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
    identity = pb.Identity(guest_uuid=config.guest_uuid, token=config.token)
    channel = grpc.insecure_channel(config.server, options=_CHANNEL_OPTIONS)
    if config.memory == "embedded":
        _run_embedded(config, channel, identity)
    else:
        _run_in_guest(config, channel, identity)


def _run_embedded(config: Config, channel: grpc.Channel, identity: pb.Identity) -> None:
    """A whole guest in this process: its workload is a thread beside the agent."""
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
    if config.method == "none":
        serve_workload(channel, workload, identity, boot)
        return
    Thread(
        target=serve_workload,
        args=(channel, workload, identity, boot),
        name="workload",
        daemon=True,
    ).start()
    tracker = config.tracker or "bitmap"
    isolator = EmbeddedIsolator(
        allocator, tracker=tracker, threshold_chunks=config.threshold_chunks
    )
    _hint(config, channel, identity, boot, isolator, tracker, lambda: _free_bytes(allocator))


def _free_bytes(allocator: BuddyAllocator) -> int:
    return allocator.free_page_count * PAGE_BYTES


def _run_in_guest(config: Config, channel: grpc.Channel, identity: pb.Identity) -> None:
    """The agent of a real guest: the workload is a process of its own, so that its
    memory and CPU time are not the agent's."""
    if config.method == "none":
        if config.workload:
            serve_workload(channel, Workload(_anonymous()), identity, boot_id())
        return
    # Late: an embedded guest never needs it.
    from guest_agent.isolation.kmod import KmodIsolator

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
        _hint(config, channel, identity, boot_id(), KmodIsolator(), "kernel", mem_free_bytes)
    finally:
        if child is not None:
            child.kill()
            child.wait()


def run_workload_only(config: Config) -> None:
    """The workload of a real guest, without hinting: what the agent starts beside itself."""
    # The kernel is to kill the workload, not the agent, if the guest runs out of memory.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    identity = pb.Identity(guest_uuid=config.guest_uuid, token=config.token)
    channel = grpc.insecure_channel(config.server, options=_CHANNEL_OPTIONS)
    serve_workload(channel, Workload(_anonymous()), identity, boot_id())


def _anonymous() -> Source:
    return AnonymousSource(mem_available_bytes())


def _hint(
    config: Config,
    channel: grpc.Channel,
    identity: pb.Identity,
    boot: str,
    isolator: Isolator,
    tracker: str,
    free_bytes: Callable[[], int],
) -> None:
    facts = HelloFacts(
        identity=identity, boot_id=boot, chunk_order=config.chunk_order, tracker=tracker
    )
    HintingSession(channel, isolator, facts, free_bytes).run()

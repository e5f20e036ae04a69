"""The workload that an experiment runs in a guest: carries out the host's commands.

The commands allocate, free and verify memory, run loops and programs, read a file into the page
cache or drop the cache, and online or offline memory: the guest's part of a resize.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from guest_agent.workload.file_cache import FileCache
from guest_agent.workload.holding import Holding
from guest_agent.workload.loops import run_loop
from guest_agent.workload.programs import Programs
from guest_agent.workload.source import EXTENT_BYTES, Plugs, Source
from hintfleet.errors import HintfleetError, InvalidInput, Refused
from hintfleet.ranges import decode
from hintfleet.settings import LONGEST_TEXT, MOST_COMPRESSIBLE_PERCENT
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class GuestSystem:
    """What only a guest with an operating system has."""

    cache: FileCache
    programs: Programs


class Workload:
    """Holds memory, and carries out commands. The caller must run them one after the other."""

    def __init__(self, source: Source, plugs: Plugs, system: GuestSystem | None = None) -> None:
        """:param system: None in an embedded guest."""
        self._source = source
        self._holding = Holding(source)
        self._plugs = plugs
        self._system = system
        self._stop = threading.Event()

    @property
    def held_bytes(self) -> int:
        """How much memory the workload holds now."""
        return self._holding.held_bytes

    def run(self, command: pb.WorkloadCommand) -> pb.Done:
        """Run one command, and return its result.

        If there is not enough memory, or the command is refused, `Done.error` is the reason.
        Blocks that an `allocate` took before it failed stay allocated; a loop frees its own.
        """
        started_s = time.monotonic()
        holding = self._holding
        held_bytes = holding.held_bytes
        verified_pages, wrong_pages = holding.verified_pages, holding.wrong_pages
        done = pb.Done(command_id=command.command_id)
        try:
            self._run(command, done)
        except MemoryError as caught:
            done.error = f"the guest is out of memory: {caught}"[:LONGEST_TEXT]
        except HintfleetError as caught:
            done.error = caught.message[:LONGEST_TEXT]
        done.changed_bytes = abs(holding.held_bytes - held_bytes)
        done.held_bytes = holding.held_bytes
        done.verified_pages = holding.verified_pages - verified_pages
        done.wrong_pages = holding.wrong_pages - wrong_pages
        done.duration_us = int((time.monotonic() - started_s) * 1e6)
        return done

    def stop(self) -> None:
        """End a loop or a program that runs, and all later ones at once. Any thread may call it."""
        self._stop.set()

    def _run(self, command: pb.WorkloadCommand, done: pb.Done) -> None:
        kind = command.WhichOneof("command")
        if kind == "allocate":
            self._allocate(command.allocate)
        elif kind == "free":
            self._holding.free_some(command.free.size_bytes, command.free.seed)
        elif kind == "verify":
            self._holding.check_all()
        elif kind == "loop":
            # Even if the loop fails: only of a loop does the host believe that more pages were
            # verified than the guest has.
            done.looped.SetInParent()
            done.looped.CopyFrom(run_loop(command.loop, self._holding, self._source, self._stop))
        elif kind in ("read", "drop_caches", "run_program"):
            self._use_system(command)
        elif kind == "online":
            self._plugs.online(decode(command.online.ranges))
        elif kind == "offline":
            self._plugs.offline(decode(command.offline.ranges))
        else:
            raise InvalidInput("this agent does not know the command: it is older than its host's")

    def _use_system(self, command: pb.WorkloadCommand) -> None:
        if self._system is None:
            raise Refused("an embedded guest has no page cache, and runs no programs")
        if command.HasField("read"):
            self._system.cache.read(command.read.size_bytes)
        elif command.HasField("drop_caches"):
            self._system.cache.drop()
        else:
            order = command.run_program
            self._system.programs.run(order.arguments, order.timeout_ms / 1000, self._stop)

    def _allocate(self, order: pb.Allocate) -> None:
        block_bytes = order.block_bytes or EXTENT_BYTES
        # The allocator would round a size that is no power of two down, and blocks would overlap.
        if block_bytes.bit_count() != 1 or not PAGE_BYTES <= block_bytes <= EXTENT_BYTES:
            raise InvalidInput(f"blocks of {block_bytes} bytes: not a power of two, 4 KiB to 2 MiB")
        if order.compressible_percent > MOST_COMPRESSIBLE_PERCENT:
            raise InvalidInput(f"{order.compressible_percent} % of a page cannot be zeros")
        for _ in range(-(-order.size_bytes // block_bytes)):
            self._holding.take(block_bytes, order.seed, order.compressible_percent)

"""What an experiment has a guest do: allocate, write, verify, free.

Every byte that the workload holds is written with a seeded pattern and compared
with it before it is freed and whenever it is verified. A page that the host
dropped although it was in use reads as zeros and is counted as wrong.

The memory comes from a `Source`: the embedded allocator, or anonymous memory of
a real guest's kernel.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Protocol

from hintfleet.errors import HintfleetError
from hintfleet.ranges import RangeSet, decode
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

EXTENT_BYTES = 2 * MIB
"""What is allocated and freed at a time: one chunk of order 9."""

_TAPE_SEED = 0x68696E74
_OFFSET_STEP_BYTES = 8


class Source(Protocol):
    """Where the workload's memory comes from. Extents are numbered by `allocate`."""

    def allocate(self) -> int:
        """Take one extent of EXTENT_BYTES and return its handle.

        :raises MemoryError: there is no more.
        """

    def write(self, extent: int, data: memoryview) -> None:
        """Fill an extent; `data` has EXTENT_BYTES bytes."""

    def read(self, extent: int) -> bytes:
        """All bytes of an extent."""

    def free(self, extent: int) -> None:
        """Give an extent back."""


class Plugs(Protocol):
    """Memory that the host has plugged, or is to unplug."""

    def online(self, pages: RangeSet) -> None:
        """Begin to use them; what is online already stays so.

        :raises hintfleet.errors.Refused: it is not there; nothing has changed.
        """

    def offline(self, pages: RangeSet) -> None:
        """Stop using them; what is offline already stays so. Isolated chunks are waited for.

        :raises hintfleet.errors.Refused: some are in use; nothing has changed.
        """


class Pattern:
    """A page-wise distinct byte pattern for each key.

    A long pseudo-random tape is made once; a key picks where on it an extent
    starts. Two different keys agree by chance in one of 262,144 cases, so a page
    that is swapped, stale or zeroed is seen, and comparing is one memcmp.
    """

    def __init__(self) -> None:
        tape = random.Random(_TAPE_SEED).randbytes(2 * EXTENT_BYTES)
        self._tape = memoryview(tape)

    def of(self, key: int) -> memoryview:
        """The EXTENT_BYTES that belong to a key."""
        mixed = (key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
        start = mixed % (EXTENT_BYTES // _OFFSET_STEP_BYTES) * _OFFSET_STEP_BYTES
        return self._tape[start : start + EXTENT_BYTES]


@dataclass
class _Count:
    verified_pages: int = 0
    wrong_pages: int = 0


class Workload:
    """Holds extents, and answers workload commands."""

    def __init__(self, source: Source, plugs: Plugs) -> None:
        self._source = source
        self._plugs = plugs
        self._pattern = Pattern()
        self._held: dict[int, int] = {}  # extent -> key
        self._next_key = 1

    @property
    def held_bytes(self) -> int:
        """What is allocated now."""
        return len(self._held) * EXTENT_BYTES

    def run(self, command: pb.WorkloadCommand) -> pb.Done:
        """Carry out one command; a failure is told in `Done.error`, and what is held stays."""
        started_s = time.monotonic()
        held_before_bytes = self.held_bytes
        count = _Count()
        error = ""
        try:
            self._run(command, count)
        except MemoryError as caught:
            error = f"the guest is out of memory: {caught}"
        except HintfleetError as caught:
            error = caught.message
        return pb.Done(
            command_id=command.command_id,
            changed_bytes=abs(self.held_bytes - held_before_bytes),
            held_bytes=self.held_bytes,
            verified_pages=count.verified_pages,
            wrong_pages=count.wrong_pages,
            duration_us=int((time.monotonic() - started_s) * 1e6),
            error=error,
        )

    def _run(self, command: pb.WorkloadCommand, count: _Count) -> None:
        kind = command.WhichOneof("command")
        if kind == "allocate":
            self._allocate(command.allocate)
        elif kind == "free":
            self._free(command.free, count)
        elif kind == "verify":
            for extent in self._held:
                self._check(extent, count)
        elif kind == "online":
            self._plugs.online(decode(command.online.ranges))
        elif kind == "offline":
            self._plugs.offline(decode(command.offline.ranges))

    def _allocate(self, order: pb.Allocate) -> None:
        for _ in range(-(-order.size_bytes // EXTENT_BYTES)):
            extent = self._source.allocate()
            key = order.seed << 32 ^ self._next_key
            self._next_key += 1
            self._source.write(extent, self._pattern.of(key))
            self._held[extent] = key

    def _free(self, order: pb.Free, count: _Count) -> None:
        wanted = min(order.size_bytes // EXTENT_BYTES, len(self._held))
        for extent in random.Random(order.seed).sample(list(self._held), wanted):
            self._check(extent, count)
            del self._held[extent]
            self._source.free(extent)

    def _check(self, extent: int, count: _Count) -> None:
        expected = self._pattern.of(self._held[extent]).tobytes()
        found = self._source.read(extent)
        count.verified_pages += EXTENT_BYTES // PAGE_BYTES
        if found != expected:
            count.wrong_pages += sum(
                found[at : at + PAGE_BYTES] != expected[at : at + PAGE_BYTES]
                for at in range(0, EXTENT_BYTES, PAGE_BYTES)
            )

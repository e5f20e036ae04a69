"""The workload that an experiment runs in a guest: allocate, write, verify, free.

The workload writes a seeded pattern to all memory that it holds. Each verify compares all this
memory with the pattern; a free compares only the memory that it frees. A page that differs is
counted as wrong. For example, a page that the host has punched although it was in use reads as
zeros.

The memory comes from a `Source`: the embedded allocator, or anonymous memory of a real guest. The
workload also carries out the guest's part of a resize, with `Plugs`.
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
"""The unit of allocating and freeing: one chunk of order 9."""

_PATTERN_SEED = 0x68696E74
_OFFSET_STEP_BYTES = 8


class Source(Protocol):
    """Gives the workload its memory, in extents of EXTENT_BYTES with a number each."""

    def allocate(self) -> int:
        """Allocate one extent and return its number.

        :raises MemoryError: there is no memory left, even after waiting for isolated chunks.
        """

    def write(self, extent: int, data: memoryview) -> None:
        """Fill the extent with this number; `data` has EXTENT_BYTES bytes."""

    def read(self, extent: int) -> bytes:
        """Return all EXTENT_BYTES bytes of the extent with this number."""

    def free(self, extent: int) -> None:
        """Free the extent with this number."""


class Plugs(Protocol):
    """Onlines memory that the host has plugged, and offlines memory that the host will unplug."""

    def online(self, pages: RangeSet) -> None:
        """Begin to use pages; those that are online already stay online.

        :raises hintfleet.errors.Refused: some pages are not there, or the guest's kernel did not
            online them. Pages that were onlined by this call are offline again if that is possible.
        """

    def offline(self, pages: RangeSet) -> None:
        """Stop using pages; those that are offline already stay offline. Waits for isolated chunks.

        :raises hintfleet.errors.Refused: some pages are in use. Pages that were offlined by this
            call are online again if that is possible.
        """


class Pattern:
    """A pattern of EXTENT_BYTES bytes for each key; no two pages of a pattern are equal.

    The patterns of all keys are parts of the same pseudo-random bytes; the key decides at which
    offset its pattern begins. Two keys have the same offset in one of 262,144 cases. So a page that
    holds zeros, older content or the content of another page is noticed, by one memcmp.
    """

    def __init__(self) -> None:
        random_bytes = random.Random(_PATTERN_SEED).randbytes(2 * EXTENT_BYTES)
        self._random_bytes = memoryview(random_bytes)

    def of(self, key: int) -> memoryview:
        """Return the pattern of a key, EXTENT_BYTES bytes."""
        # Fibonacci hashing: keys are consecutive numbers, but their offsets should be spread.
        mixed = (key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
        start = mixed % (EXTENT_BYTES // _OFFSET_STEP_BYTES) * _OFFSET_STEP_BYTES
        return self._random_bytes[start : start + EXTENT_BYTES]


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
        """How much memory the workload holds now."""
        return len(self._held) * EXTENT_BYTES

    def run(self, command: pb.WorkloadCommand) -> pb.Done:
        """Run one command, and return its result.

        If there is not enough memory, or the command is refused, `Done.error` is the reason.
        Extents that were allocated before the failure stay allocated.
        """
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

    def _allocate(self, command: pb.Allocate) -> None:
        for _ in range(-(-command.size_bytes // EXTENT_BYTES)):
            extent = self._source.allocate()
            key = command.seed << 32 ^ self._next_key
            self._next_key += 1
            self._source.write(extent, self._pattern.of(key))
            self._held[extent] = key

    def _free(self, command: pb.Free, count: _Count) -> None:
        wanted = min(command.size_bytes // EXTENT_BYTES, len(self._held))
        for extent in random.Random(command.seed).sample(list(self._held), wanted):
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

"""What a workload needs of its guest: memory, and the guest's part of a resize."""

from __future__ import annotations

from typing import Protocol

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB

EXTENT_BYTES = 2 * MIB
"""The largest block: one chunk of order 9."""


class Source(Protocol):
    """Gives the workload its memory in blocks. A block has an address in bytes, and a size: a
    power of two, from a page to EXTENT_BYTES."""

    def allocate(self, size_bytes: int) -> int:
        """Allocate one block and return its address.

        :raises MemoryError: no such block can be had, even after waiting for memory.
        """

    def write(self, at: int, data: memoryview) -> None:
        """Fill the block at this address; `data` has as many bytes as the block."""

    def read(self, at: int, size_bytes: int) -> bytes:
        """Return all bytes of the block at this address."""

    def copy(self, source_at: int, target_at: int) -> None:
        """Copy one extent to another."""

    def touch(self, at: int) -> None:
        """Write one byte to each page of an extent that was just allocated, so that each write is
        a page fault."""

    def free(self, at: int, size_bytes: int) -> None:
        """Free the block at this address."""


class Plugs(Protocol):
    """Onlines memory that the host has plugged, and offlines memory that the host will unplug."""

    def online(self, pages: RangeSet) -> None:
        """Begin to use pages; those that are online already stay online.

        :raises hintfleet.errors.Refused: some pages are not there, or the guest's kernel did not
            online them. Pages that were onlined by this call are offline again if that is possible.
        """

    def offline(self, pages: RangeSet) -> None:
        """Stop using pages; those that are offline already stay offline. May wait, up to a timeout,
        for the release of isolated chunks or for the guest's kernel.

        :raises hintfleet.errors.Refused: some pages are in use (embedded guest), or the kernel
            cannot move what is in them or take them offline (real guest), or the guest would have
            too little memory left. Pages that were offlined by this call are online again if that
            is possible.
        """

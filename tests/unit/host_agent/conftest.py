"""A guest's RAM on a real memfd."""

import os
from collections.abc import Iterator

import pytest

from hintfleet.units import PAGE_BYTES
from host_agent.memory.ram import GuestRam, Segment

RAM_PAGES = 4096


@pytest.fixture
def ram_fd() -> int:
    fd = os.memfd_create("test-ram")
    os.truncate(fd, RAM_PAGES * PAGE_BYTES)
    return fd


@pytest.fixture
def ram(ram_fd: int) -> Iterator[GuestRam]:
    """Yield RAM in one file. Its guest physical addresses have a gap, as in a QEMU guest with more
    than 3 GiB: pages 0 to 1023 are at offset 0 of the file, pages 2048 to 5119 right behind
    them."""
    low = Segment(pfn=0, page_count=1024, fd=ram_fd, offset_bytes=0)
    high = Segment(pfn=2048, page_count=3072, fd=ram_fd, offset_bytes=1024 * PAGE_BYTES)
    made = GuestRam([high, low])
    yield made
    made.close()

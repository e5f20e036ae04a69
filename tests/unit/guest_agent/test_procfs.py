"""Memory figures of the kernel: the total is that of the C library, free memory and that of this
process are plausible, and a missing field of /proc/meminfo is refused."""

import os

import pytest

from guest_agent import procfs
from hintfleet.errors import Refused


def test_memory_agrees_with_the_c_library() -> None:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert procfs.mem_total_bytes() == total_bytes
    assert procfs.mem_free_bytes() == pytest.approx(procfs._meminfo("MemFree"), abs=total_bytes / 9)
    assert 0 < procfs.own_rss_bytes() < total_bytes


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(Refused, match="/proc/meminfo has no MemFre"):
        procfs._meminfo("MemFre")

"""Memory figures from the kernel's files agree with those of the C library."""

import os

import pytest

from guest_agent import procfs
from hintfleet.errors import Refused


def test_memory_as_the_c_library_says() -> None:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert procfs.mem_total_bytes() == total_bytes
    assert procfs.mem_free_bytes() == pytest.approx(procfs._meminfo("MemFree"), abs=total_bytes / 9)
    assert 0 < procfs.own_rss_bytes() < total_bytes


def test_a_field_that_is_not_there_is_refused_not_guessed() -> None:
    with pytest.raises(Refused, match="/proc/meminfo has no MemFre"):
        procfs._meminfo("MemFre")

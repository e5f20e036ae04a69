"""The memory of a guest's process, without the guest's RAM."""

import mmap
import os
import subprocess
import sys

from hintfleet.units import MIB
from host_agent.guests.process_memory import ProcessMemory


def test_shared_memory_does_not_count_and_private_memory_does() -> None:
    before = ProcessMemory().rss_bytes(os.getpid())
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 64 * MIB)
    with mmap.mmap(fd, 64 * MIB) as ram:
        ram[:] = bytes(64 * MIB)
        after = ProcessMemory().rss_bytes(os.getpid())
    os.close(fd)
    heap = bytearray(os.urandom(1)) * (64 * MIB)
    grown = ProcessMemory().rss_bytes(os.getpid())
    assert before is not None
    assert after is not None
    assert grown is not None
    assert after - before < 16 * MIB
    assert grown - after > 48 * MIB
    assert len(heap) == 64 * MIB


def test_what_was_read_is_kept_for_a_while_but_not_for_another_process() -> None:
    memory = ProcessMemory()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        first = memory.rss_bytes(child.pid)
        assert first
        child.kill()
    assert memory.rss_bytes(child.pid) == first
    assert memory.rss_bytes(0) is None, "no process"
    assert ProcessMemory().rss_bytes(child.pid) is None

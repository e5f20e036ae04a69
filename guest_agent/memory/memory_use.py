"""What the memory of a real guest is used for, as its kernel shows it in /proc.

`memory_use_of` is pure: texts in, figures out.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from guest_agent.memory.kernel import free_chunk_count, parse_buddyinfo
from guest_agent.procfs import parse_kib
from hintfleet.errors import Refused
from hintfleet.logs import fields
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb

# Lines of each zone, and of each processor in a zone (mm/vmstat.c: zoneinfo_show_print). Searched
# for in all of the text: `parse_zoneinfo` needs five times as long, to find out more.
_PRESENT = re.compile(rb"^ +present +([0-9]{1,12})$", re.MULTILINE)
_PER_CPU = re.compile(rb"^ +count: +([0-9]{1,12})$", re.MULTILINE)

_log = logging.getLogger("hintfleet.guest.memory")


class KernelMemoryUse:
    """Reads what the guest's memory is used for.

    A call took 0.3 ms on two processors and 24 GiB, nearly all of it for /proc/zoneinfo, whose text
    grows with zones times processors. Called once in 10 s, as at rest, that is 0.003 % of a core.
    """

    def __init__(
        self, chunk_order: int, proc_root: Path = Path("/proc"), sys_root: Path = Path("/sys")
    ) -> None:
        self._chunk_order = chunk_order
        self._proc_root = proc_root
        self._crash_size = sys_root / "kernel/kexec_crash_size"
        self._failure_logged = False

    def __call__(self, isolated_pages: int) -> pb.MemoryUse | None:
        """Return what the memory is used for now; None if this kernel does not show it, which is
        logged once: hinting works without it.

        :param isolated_pages: what the isolator holds, which the kernel counts as in use.
        """
        try:
            return memory_use_of(
                zoneinfo=(self._proc_root / "zoneinfo").read_bytes(),
                buddyinfo=(self._proc_root / "buddyinfo").read_text(),
                meminfo=(self._proc_root / "meminfo").read_bytes(),
                crash_kernel_bytes=self._crash_kernel_bytes(),
                chunk_order=self._chunk_order,
                isolated_pages=isolated_pages,
            )
        except (OSError, ValueError, Refused) as error:
            if not self._failure_logged:
                _log.warning("memory use is not known", extra=fields(reason=error))
            self._failure_logged = True
            return None

    def _crash_kernel_bytes(self) -> int:
        """Return how much is kept for a crash kernel, which most guests never touch."""
        try:
            return int(self._crash_size.read_text())
        except FileNotFoundError:  # without CONFIG_CRASH_DUMP (before 6.9: CONFIG_KEXEC_CORE)
            return 0


def memory_use_of(
    *,
    zoneinfo: bytes,
    buddyinfo: str,
    meminfo: bytes,
    crash_kernel_bytes: int,
    chunk_order: int,
    isolated_pages: int,
) -> pb.MemoryUse:
    """Return what all memory is used for, from the texts of the files with these names.

    No kernel counts what is in use: `used_bytes` is what the other figures leave of `total_bytes`,
    which is all present pages without those of a crash kernel. So `used_bytes` includes what the
    kernel keeps for itself and leaves out of MemTotal (its text, the page structs). Holes of the
    firmware are not present, so they are not taken for memory in use. The texts are read one after
    the other: a figure may be wrong by what moved meanwhile.

    :raises Refused: a text is not that of such a file, or more is free, isolated and file cache
        than there is memory.
    """
    present_pages = sum(map(int, _PRESENT.findall(zoneinfo)))
    total_bytes = present_pages * PAGE_BYTES - crash_kernel_bytes
    # Pages in the lists of processors are in no free list, and not in MemFree.
    per_cpu_pages = sum(map(int, _PER_CPU.findall(zoneinfo)))
    lists = parse_buddyinfo(buddyinfo).values()
    chunk_pages = free_chunk_count(lists, chunk_order) << chunk_order
    piece_pages = (free_chunk_count(lists, 0) - chunk_pages) + per_cpu_pages
    # tmpfs is in Cached, but nobody can drop it.
    buffers, cached, shmem = (
        parse_kib(meminfo, key, "/proc/meminfo") for key in ("Buffers", "Cached", "Shmem")
    )
    file_cache_bytes = max(0, buffers + cached - shmem)
    known_bytes = file_cache_bytes + (chunk_pages + piece_pages + isolated_pages) * PAGE_BYTES
    if known_bytes > total_bytes:
        raise Refused(
            f"/proc/zoneinfo shows {total_bytes} bytes, but {known_bytes} are free or file cache"
        )
    return pb.MemoryUse(
        total_bytes=total_bytes,
        used_bytes=total_bytes - known_bytes,
        file_cache_bytes=file_cache_bytes,
        free_chunks_bytes=chunk_pages * PAGE_BYTES,
        free_pieces_bytes=piece_pages * PAGE_BYTES,
        isolated_bytes=isolated_pages * PAGE_BYTES,
    )

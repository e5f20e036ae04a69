"""Measure what tracking costs: scans of the bitmap, and reading the kernel's page flags."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from guest_agent.memory.kernel import KPF_HUGE, PageFlags
from guest_agent.tracking import BitmapTracker
from hintfleet.errors import Refused
from hintfleet.units import GIB, PAGE_BYTES
from tests.bench.report import Figure, side_by_side

_ROUNDS = 9
# Many rounds, because Python makes a loop faster only after some calls (PEP 659), and an agent has
# made many.
_FLAG_ROUNDS = 401
_TIB_CHUNKS = (1 << 40) // PAGE_BYTES >> 9
_FLAG_SPAN = range(4 * GIB // PAGE_BYTES)


def run() -> Iterator[Figure]:
    """Yield the time of a scan, huge guest / small guest, and the speed of reading page flags /
    of bare reads. Leave out the second figure if this kernel's page flags may not be read."""
    scans = [(_scan_us(_TIB_CHUNKS), _scan_us(2048)) for _ in range(_ROUNDS)]
    yield side_by_side(
        "scan of 16 bits, 1 TiB guest / 4 GiB guest", "us", scans, "< 50 us, ratio near 1"
    )
    try:
        flags = PageFlags()
    except Refused:
        return
    offsets = [pfn * 8 for pfn in range(_FLAG_SPAN.start, _FLAG_SPAN.stop, 512)]
    fd = os.open("/proc/kpageflags", os.O_RDONLY)
    reads = [(1 / _flags_s(flags), 1 / _bare_reads_s(fd, offsets)) for _ in range(_FLAG_ROUNDS)]
    os.close(fd)
    name = "page flags of all chunks of 4 GiB / Python's fastest loop of bare reads"
    yield side_by_side(name, "1/s", reads, ">= 0.9")
    flags.close()


def _scan_us(chunks: int) -> float:
    tracker = BitmapTracker(9)
    for n in range(16):
        tracker.mark(n * (chunks // 16) << 9)
    started_ns = time.perf_counter_ns()
    taken = tracker.take(1000)
    elapsed_ns = time.perf_counter_ns() - started_ns
    if len(taken) != 16:
        raise RuntimeError("the scan did not find what was marked")
    return elapsed_ns / 1000


def _flags_s(flags: PageFlags) -> float:
    return _elapsed_s(lambda: flags.chunks_with(KPF_HUGE, [_FLAG_SPAN], 9))


def _bare_reads_s(fd: int, offsets: list[int]) -> float:
    """Return the time of bare reads in a `for` loop, which is faster than map() with unused
    results. The offsets are computed beforehand, as `PageFlags` keeps them from its first call."""

    def loop() -> None:
        pread = os.pread
        for offset in offsets:
            pread(fd, 8, offset)

    return _elapsed_s(loop)


def _elapsed_s(act: Callable[[], object]) -> float:
    """Return the CPU time of a call, which leaves out what else runs on the machine."""
    began_s = time.process_time()
    act()
    return time.process_time() - began_s

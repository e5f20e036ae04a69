"""Measure what holes in the physical address space cost a guest's agent: its allocator and tracker,
its hints, and its reads of page flags, with 4 GiB of memory spread over 1 TiB / in one piece.

Times are CPU times, which leave out what else runs on the machine.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from guest_agent.isolation.embedded import EmbeddedIsolator
from guest_agent.memory.buddy import BuddyAllocator, ZoneSpec
from guest_agent.memory.kernel import KPF_HUGE, PageFlags, present_spans
from hintfleet.ranges import RangeSet
from hintfleet.units import GIB, MIB, PAGE_BYTES
from tests.bench.report import Figure, side_by_side

_ROUNDS = 25
_CHUNK_ORDER = 9
_BLOCK_PAGES = 128 * MIB // PAGE_BYTES
_BLOCKS = 4 * GIB // (128 * MIB)
_SPREAD = 1024 // 4
_USED_CHUNKS = 2000  # of 2048: the watermarks keep a few free


def run() -> Iterator[Figure]:
    """Yield figures of memory that is spread over 1 TiB / in one piece: the size of allocator and
    tracker, and the time to hint all chunks that were used and freed (embedded guests); and the
    time of a look through the page flags, as in real guests, but in a file of zeros: without the
    kernel's part."""
    guests = [(_hinted(_SPREAD), _hinted(1)) for _ in range(_ROUNDS)]
    for name, unit, which in (("memory", "KiB", 0), ("time to hint 3.9 GiB of it", "ms", 1)):
        yield side_by_side(
            f"4 GiB spread over 1 TiB / in one piece, {name}",
            unit,
            [(sparse[which], dense[which]) for sparse, dense in guests],
            "near 1",
        )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        sparse, dense = Path(folder, "sparse"), Path(folder, "dense")
        _make_kernel(sparse, _SPREAD)
        _make_kernel(dense, 1)
        looks = [(_look_ms(sparse), _look_ms(dense)) for _ in range(_ROUNDS)]
    name = "4 GiB spread over 1 TiB / in one piece, reading the page flags"
    yield side_by_side(name, "ms", looks, "near 1")


def _hinted(spread: int) -> tuple[float, float]:
    """Return the KiB of allocator and tracker while _USED_CHUNKS wait to be hinted, and the ms to
    hint them."""
    present = RangeSet((n * spread * _BLOCK_PAGES, _BLOCK_PAGES) for n in range(_BLOCKS))
    tracemalloc.start()
    allocator = BuddyAllocator([ZoneSpec(name="Normal", present=present)], chunk_order=_CHUNK_ORDER)
    isolator = EmbeddedIsolator(allocator, threshold_chunks=1)
    for pfn in [allocator.allocate(_CHUNK_ORDER) for _ in range(_USED_CHUNKS)]:
        allocator.free(pfn, _CHUNK_ORDER)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    hinted_pages = 0
    began_s = time.process_time()
    while batch := isolator.isolate(512, 1 << 20):
        hinted_pages += batch.page_count
        isolator.release(batch, hinted=True)
    elapsed_s = time.process_time() - began_s
    if hinted_pages != _USED_CHUNKS << _CHUNK_ORDER:
        raise RuntimeError(f"{hinted_pages} pages were hinted, which is not what was freed")
    return held_bytes / 1024, elapsed_s * 1000


def _make_kernel(root: Path, spread: int) -> None:
    """Make, in `root`, the memory blocks (of /sys) and the page flags (of /proc) of a guest with
    this spread. The file of page flags has holes where the guest's memory has holes."""
    blocks = root / "devices/system/memory"
    blocks.mkdir(parents=True)
    (blocks / "block_size_bytes").write_text(f"{128 * MIB:x}\n")
    for n in range(_BLOCKS):
        (blocks / f"memory{n * spread}").mkdir()
    with (root / "kpageflags").open("wb") as flags:
        for n in range(_BLOCKS):
            flags.seek(n * spread * _BLOCK_PAGES * 8)
            flags.write(bytes(_BLOCK_PAGES * 8))


def _look_ms(root: Path) -> float:
    flags = PageFlags(str(root / "kpageflags"))
    began_s = time.process_time()
    flags.chunks_with(KPF_HUGE, present_spans(root), _CHUNK_ORDER)
    elapsed_s = time.process_time() - began_s
    flags.close()
    return elapsed_s * 1000

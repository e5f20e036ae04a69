"""The parsers of /proc/zoneinfo, buddyinfo and meminfo: they return possible numbers, or raise
Refused."""

from __future__ import annotations

from guest_agent.memory.kernel import free_chunk_count, parse_buddyinfo, parse_zoneinfo
from guest_agent.memory.memory_use import memory_use_of
from guest_agent.procfs import parse_kib
from hintfleet.errors import Refused
from hintfleet.ranges import MAX_PFN
from tests.fuzz.target import DATA, Target

_ORDERS = 11


def _zoneinfo(text: str) -> None:
    try:
        zones = parse_zoneinfo(text)
    except Refused as error:
        str(error).encode()
        return
    assert zones
    for zone in zones:
        assert zone.node >= 0
        assert zone.name
        assert 0 < zone.present_pages <= zone.spanned_pages
        assert 0 <= zone.start_pfn < zone.start_pfn + zone.spanned_pages <= MAX_PFN
        assert zone.low_watermark_pages >= 0
        for number in (zone.start_pfn, zone.spanned_pages, zone.present_pages):
            assert str(number) in text


def _buddyinfo(text: str) -> None:
    try:
        lists = parse_buddyinfo(text)
    except Refused as error:
        str(error).encode()
        return
    assert lists
    for counts in lists.values():
        assert counts
        assert all(0 <= count <= MAX_PFN for count in counts)
        chunks = sum(n * 2 ** (order - 9) for order, n in enumerate(counts) if order >= 9)
        assert free_chunk_count([counts], 9) == chunks


def _meminfo(data: bytes) -> None:
    lines = [line.split() for line in data.split(b"\n") if line.startswith(b"MemFree:")]
    try:
        free_bytes = parse_kib(data, "MemFree", "/proc/meminfo")
    except Refused:
        return
    assert int(lines[0][1]) * 1024 == free_bytes
    assert lines[0][2] == b"kB"


def _memory_use(data: bytes, text: str) -> None:
    """Take the input for all three texts at once, then for each one of them beside two valid
    texts; check that the parts of the memory add up."""
    real = (_SMALL + b"              count: 7\n", _ONE_ZONE, _MEMINFO)
    for zoneinfo, buddyinfo, meminfo in (
        (data, text, data),
        (data, *real[1:]),
        (real[0], text, real[2]),
        (*real[:2], data),
    ):
        try:
            use = memory_use_of(
                zoneinfo=zoneinfo,
                buddyinfo=buddyinfo,
                meminfo=meminfo,
                crash_kernel_bytes=0,
                chunk_order=9,
                isolated_pages=0,
            )
        except Refused as error:
            str(error).encode()
            continue
        figures = (use.used_bytes, use.file_cache_bytes, use.free_chunks_bytes)
        assert sum(figures) + use.free_pieces_bytes == use.total_bytes


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    _memory_use(data, text)
    _meminfo(data)
    _zoneinfo(text)
    _buddyinfo(text)


_SMALL = b"""Node 0, zone      DMA
  pages free     3840
        low      83
        spanned  4095
        present  3998
  start_pfn:           1
Node 0, zone  Movable
  pages free     0
        low      0
        spanned  0
        present  0
"""

_ONE_ZONE = "Node 0, zone DMA 1 0 0 0 0 0 0 0 0 1 1\n"
_MEMINFO = b"Buffers:  10 kB\nCached:   900 kB\nShmem:   20 kB\n"

TARGET = Target.of(
    try_input,
    seeds=(
        _SMALL,
        _SMALL + _ONE_ZONE.encode() + _MEMINFO,
        b"MemTotal:       24576000 kB\nMemFree:        20000000 kB\nMemAvailable: 0 kB\n",
        (DATA / "zoneinfo-24GiB.txt").read_bytes(),
        (DATA / "buddyinfo-24GiB.txt").read_bytes(),
    ),
    words=(
        *("Node 0, zone ", "Normal", "        low      ", "        spanned  ", "\u0661", "9" * 30),
        *("        present  ", "  start_pfn: ", "\n", "1099511627776", "MemFree: ", " kB"),
        *("Cached: ", "Shmem: ", "              count: "),
    ),
    max_bytes=2048,
    quick_runs=15_000,
)

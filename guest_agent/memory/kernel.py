"""The memory of a real guest as its kernel tells it: zones, free lists, page flags.

The parsers are pure: text or bytes in, values out. `PageFlags` reads
/proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst) and only the entries
that are asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import PAGE_BYTES

KPF_HUGE = 17
"""Bit of /proc/kpageflags: part of a hugetlb page (include/uapi/linux/kernel-page-flags.h)."""

_ENTRY_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ZoneInfo:
    """One populated zone of /proc/zoneinfo.

    :ivar start_pfn: first page of its span, which may have holes.
    """

    node: int
    name: str
    start_pfn: int
    spanned_pages: int
    present_pages: int
    low_watermark_pages: int


def parse_zoneinfo(text: str) -> list[ZoneInfo]:
    """The zones that have memory, in the kernel's order.

    :raises Refused: the text is not that of a /proc/zoneinfo.
    """
    zones = []
    for node, name, body in re.findall(
        r"^Node (\d+), zone +(\w+)\n(.*?)(?=^Node |\Z)", text, re.MULTILINE | re.DOTALL
    ):
        numbers = dict(re.findall(r"^ +(low|spanned|present|start_pfn):? +(\d+)$", body, re.M))
        if numbers.keys() != {"low", "spanned", "present", "start_pfn"}:
            if "start_pfn" in numbers:
                raise Refused(f"/proc/zoneinfo: zone {name} of node {node} is not understood")
            continue  # a zone without memory has no start_pfn
        if int(numbers["present"]):
            zones.append(
                ZoneInfo(
                    node=int(node),
                    name=name,
                    start_pfn=int(numbers["start_pfn"]),
                    spanned_pages=int(numbers["spanned"]),
                    present_pages=int(numbers["present"]),
                    low_watermark_pages=int(numbers["low"]),
                )
            )
    if not zones:
        raise Refused("/proc/zoneinfo names no zone with memory")
    return zones


def parse_buddyinfo(text: str) -> dict[tuple[int, str], list[int]]:
    """Free blocks per order for each (node, zone).

    :raises Refused: the text is not that of a /proc/buddyinfo.
    """
    lines = re.findall(r"^Node (\d+), zone +(\w+)((?: +\d+)+) *$", text, re.MULTILINE)
    if not lines:
        raise Refused("/proc/buddyinfo is not understood")
    return {(int(node), zone): [int(n) for n in counts.split()] for node, zone, counts in lines}


def free_chunk_count(free_blocks: Iterable[list[int]], chunk_order: int) -> int:
    """Whole free chunks in the free lists of some zones."""
    return sum(
        count << order - chunk_order
        for counts in free_blocks
        for order, count in enumerate(counts)
        if order >= chunk_order
    )


def present_spans(sys_root: Path = Path("/sys"), proc_root: Path = Path("/proc")) -> list[range]:
    """Where the guest has memory now, as runs of pfns: its memory blocks.

    A hole of a sparse zone is in none, and a block that is hot-plugged is in the next
    answer (Documentation/admin-guide/mm/memory-hotplug.rst). A kernel without memory
    hotplug has no blocks; there the zones' spans, holes included, have to do.
    """
    blocks = sys_root / "devices/system/memory"
    try:
        block_pages = int((blocks / "block_size_bytes").read_text(), 16) // PAGE_BYTES
    except FileNotFoundError:
        zones = parse_zoneinfo((proc_root / "zoneinfo").read_text())
        return [range(zone.start_pfn, zone.start_pfn + zone.spanned_pages) for zone in zones]
    numbers = [int(name[6:]) for name in os.listdir(blocks) if re.fullmatch(r"memory\d+", name)]
    present = RangeSet((number * block_pages, block_pages) for number in numbers)
    return [range(pfn, pfn + pages) for pfn, pages in present]


class PageFlags:
    """Reads /proc/kpageflags."""

    def __init__(self, path: str = "/proc/kpageflags") -> None:
        """:raises Refused: there is none, or it may not be read."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(
                f"cannot read {path}: {error.strerror}",
                hint="run as root, on a kernel with CONFIG_PROC_PAGE_MONITOR",
            ) from error

    def chunks_with(self, bit: int, spans: Iterable[range], chunk_order: int) -> list[int]:
        """First pfns of the chunks in `spans` whose first page has a flag.

        One read of 8 bytes a chunk: the flags of the other pages are not needed, and
        making them is what the kernel's side of such a read costs.
        """
        # Locals: in this loop a look-up of a global costs a tenth of the read itself.
        fd, pread, size = self._fd, os.pread, _ENTRY_BYTES
        step = size << chunk_order
        byte, mask = bit >> 3, 1 << (bit & 7)
        found: list[int] = []
        for span in spans:
            first = -(-span.start * size // step) * step
            offsets = range(first, span.stop * size - step + 1, step)
            try:
                found += [at >> 3 for at in offsets if pread(fd, size, at)[byte] & mask]
            except IndexError:  # nothing is read behind the last page that there is
                found += [
                    at >> 3
                    for at in offsets
                    if (entry := pread(fd, size, at)) and entry[byte] & mask
                ]
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

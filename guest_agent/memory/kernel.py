"""The memory of a real guest as its kernel reports it: zones, free lists, blocks, page flags.

The functions `parse_...` are pure: text in, values out. `present_spans`, `FreeLists` and
`PageFlags` read files. `PageFlags` reads single entries of /proc/kpageflags
(Documentation/admin-guide/mm/pagemap.rst). Also mounts a hugetlbfs.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.ranges import MAX_PFN, RangeSet
from hintfleet.units import PAGE_BYTES

# Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h).
KPF_BUDDY = 10
"""Free: any page of a block in the free lists, not only its first (fs/proc/page.c)."""
KPF_HUGE = 17
"""Part of a hugetlb page."""

_ENTRY_BYTES = 8

# include/uapi/linux/mount.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8


@dataclass(frozen=True, kw_only=True)
class ZoneInfo:
    """One zone of /proc/zoneinfo that has memory.

    :ivar start_pfn: first page of the zone's span, which may have holes.
    """

    node: int
    name: str
    start_pfn: int
    spanned_pages: int
    present_pages: int
    low_watermark_pages: int


def parse_zoneinfo(text: str) -> list[ZoneInfo]:
    """Return the zones that have memory, in the kernel's order.

    :raises Refused: `text` is not the content of a /proc/zoneinfo.
    """
    zones = []
    for node, name, body in re.findall(
        r"^Node ([0-9]{1,4}), zone +(\w+)\n(.*?)(?=^Node |\Z)", text, re.MULTILINE | re.DOTALL
    ):
        found = re.findall(r"^ +(low|spanned|present|start_pfn):? +([0-9]{1,20})$", body, re.M)
        numbers = {key: int(number) for key, number in found}
        if "start_pfn" not in numbers:
            continue  # the kernel prints no start_pfn for a zone without memory (mm/vmstat.c)
        try:
            zone = ZoneInfo(
                node=int(node),
                name=name,
                start_pfn=numbers["start_pfn"],
                spanned_pages=numbers["spanned"],
                present_pages=numbers["present"],
                low_watermark_pages=numbers["low"],
            )
        except KeyError:
            zone = None
        if zone is None or not _is_possible(zone):
            raise Refused(f"/proc/zoneinfo: zone {name} of node {node} is not understood")
        if zone.present_pages:
            zones.append(zone)
    if not zones:
        raise Refused("/proc/zoneinfo names no zone with memory")
    return zones


def _is_possible(zone: ZoneInfo) -> bool:
    end_pfn = zone.start_pfn + zone.spanned_pages
    return zone.present_pages <= zone.spanned_pages and end_pfn <= MAX_PFN


def parse_buddyinfo(text: str) -> dict[tuple[int, str], list[int]]:
    """Return a list for each (node, zone): the number of free blocks of order 0, 1, 2 and so on.

    :raises Refused: `text` is not the content of a /proc/buddyinfo.
    """
    lists = {}
    for line in text.splitlines():
        match line.split():
            case ["Node", node, "zone", zone, *counts] if counts and _are_counts(
                node.rstrip(","), *counts
            ):
                lists[int(node.rstrip(",")), zone] = [int(count) for count in counts]
            case _:
                raise Refused(f"/proc/buddyinfo is not understood: {line!r}")
    if not lists:
        raise Refused("/proc/buddyinfo names no zone")
    return lists


def _are_counts(*words: str) -> bool:
    """Return whether each word is a number of at most 12 digits."""
    # No count exceeds 2**39 (12 digits): there are at most MAX_PFN pages, and at most every second
    # one is a free block of order 0, since two free buddies are merged.
    return all(word.isdecimal() and len(word) <= 12 for word in words)


def free_chunk_count(free_blocks: Iterable[list[int]], chunk_order: int) -> int:
    """Return the number of whole free chunks in the free lists of some zones."""
    return sum(
        count << order - chunk_order
        for counts in free_blocks
        for order, count in enumerate(counts)
        if order >= chunk_order
    )


def present_spans(sys_root: Path = Path("/sys"), proc_root: Path = Path("/proc")) -> list[range]:
    """Return where the guest has memory now, as ranges of pfns.

    These are the ranges of its memory blocks, online or offline, without the holes between blocks
    (Documentation/admin-guide/mm/memory-hotplug.rst). The blocks are listed anew by each call, so
    hot-plugged ones are included. A kernel without memory hotplug has no blocks: then the result is
    the spans of the zones, with their holes.
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


class FreeLists:
    """Reads /proc/buddyinfo, mostly by one system call; parses it only if it has changed."""

    def __init__(self, chunk_order: int, path: str = "/proc/buddyinfo") -> None:
        """:raises Refused: the file cannot be opened."""
        self._chunk_order = chunk_order
        self._fd = _open(path, "mount /proc")
        self._text = b""
        self._free_chunk_count = 0

    def free_chunk_count(self) -> int:
        """Return the number of whole free chunks in all zones now.

        :raises Refused: the file is not a /proc/buddyinfo.
        """
        text = self._read()
        if text != self._text:
            lists = parse_buddyinfo(text.decode())
            self._free_chunk_count = free_chunk_count(lists.values(), self._chunk_order)
            self._text = text
        return self._free_chunk_count

    def _read(self) -> bytes:
        # A read returns whole lines, as many as fit into a page (fs/seq_file.c). So a part of up to
        # half a page is the last one, and only a machine with many nodes needs a second read.
        text = part = os.pread(self._fd, PAGE_BYTES, 0)
        while len(part) > PAGE_BYTES // 2:
            part = os.pread(self._fd, PAGE_BYTES, len(text))
            text += part
        return text

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class PageFlags:
    """Reads /proc/kpageflags."""

    def __init__(self, path: str = "/proc/kpageflags") -> None:
        """:raises Refused: the file is not there, or may not be read."""
        self._fd = _open(path, "run as root, on a kernel with CONFIG_PROC_PAGE_MONITOR")
        self._offsets_key: tuple[tuple[range, ...], int] = ((), 0)
        self._kept_offsets: list[int] = []

    def chunks_with(self, bit: int, spans: Iterable[range], chunk_order: int) -> list[int]:
        """Return the first pfns of the chunks in `spans` whose first page has the flag `bit`."""
        byte, mask = bit >> 3, 1 << (bit & 7)
        # Read 8 bytes for each chunk, not the whole file: the cost of a read is that the kernel
        # computes the flags of each page that is read (fs/proc/page.c: stable_page_flags). The
        # loop uses only local variables: so the loop itself costs less than a tenth of its reads.
        pread, fd, size_bytes = os.pread, self._fd, _ENTRY_BYTES
        found = []
        for offset in self._offsets(tuple(spans), chunk_order):
            try:
                if pread(fd, size_bytes, offset)[byte] & mask:
                    found.append(offset // size_bytes)
            except IndexError:
                continue  # no such page: the read was past the last one, and empty
        return found

    def _offsets(self, spans: tuple[range, ...], chunk_order: int) -> list[int]:
        """Return the offset in the file of the first page of each whole chunk in `spans`."""
        # The list is kept until memory is plugged or unplugged; it costs 20 KiB for each GiB of
        # memory.
        if self._offsets_key != (spans, chunk_order):
            step = _ENTRY_BYTES << chunk_order
            self._kept_offsets = []
            for span in spans:
                first = -(-span.start * _ENTRY_BYTES // step) * step
                self._kept_offsets += range(first, span.stop * _ENTRY_BYTES - step + 1, step)
            self._offsets_key = (spans, chunk_order)
        return self._kept_offsets

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _open(path: str, hint: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}", hint=hint) from error


def mount_hugetlbfs(mount_point: Path) -> None:
    """Mount a hugetlbfs of 2 MiB pages that only root can enter.

    :raises Refused: this process may not, or the kernel has none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if libc.mount(b"none", bytes(mount_point), b"hugetlbfs", flags, b"pagesize=2M,mode=0700"):
        raise Refused(
            f"cannot mount hugetlbfs at {mount_point}: {os.strerror(ctypes.get_errno())}",
            hint="run the guest agent as root, on a kernel with CONFIG_HUGETLBFS",
        )

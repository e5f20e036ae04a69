"""Parses HMP `info mtree -f`: where a guest's RAM lies in QEMU's RAM blocks. Pure.

The lines that matter look like this, in the flat view of address space "memory" (QEMU:
softmmu/memory.c, mtree_print_flatview):

      0000000000100000-000000003fffffff (prio 0, ram): pc.ram @0000000000100000 KVM
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from hintfleet.errors import Refused

_RANGE = re.compile(
    r"\s+(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) "
    r"\(prio -?\d+, (?P<kind>[^)]+)\): (?P<block>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?"
)
_MEMORY_VIEW = re.compile(r'^ AS "memory",', re.M)


@dataclass(frozen=True, kw_only=True)
class RamRange:
    """A run of guest physical addresses that lies in one piece in one RAM block.

    :ivar address: address of the first byte, guest physical.
    :ivar offset_bytes: offset of that byte in the block.
    """

    address: int
    size_bytes: int
    block: str
    offset_bytes: int

    @property
    def end(self) -> int:
        """The address behind the last byte, guest physical."""
        return self.address + self.size_bytes


def parse(text: str) -> list[RamRange]:
    """Return the RAM ranges of the guest's memory, in address order.

    They include ranges of blocks that are not main memory, such as a video card's. Only the file
    behind a block tells whether the block is main memory.

    :raises Refused: `text` has no flat view of the guest's memory, or ranges of it overlap.
    """
    lines = "\n".join(text.splitlines())  # the monitor ends lines with CR LF
    for view in re.split(r"^FlatView #\d+$", lines, flags=re.M):
        if _MEMORY_VIEW.search(view):
            ranges = list(_ram_ranges(view))
            if any(a.end > b.address for a, b in pairwise(ranges)):
                raise Refused("QEMU's flat view of the guest's memory has ranges that overlap")
            return ranges
    raise Refused(
        'QEMU\'s `info mtree -f` shows no address space "memory"',
        hint="this QEMU is not understood; please report its version",
    )


def _ram_ranges(view: str) -> Iterator[RamRange]:
    for line in view.splitlines():
        match = _RANGE.fullmatch(line)
        if match and match["kind"] == "ram":
            first, last = int(match["first"], 16), int(match["last"], 16)
            if last < first:
                raise Refused(f"QEMU's flat view of the guest's memory: {line.strip()!r}")
            yield RamRange(
                address=first,
                size_bytes=last + 1 - first,
                block=match["block"],
                offset_bytes=int(match["offset"] or "0", 16),
            )


def whole_block(ranges: Iterable[RamRange], size_bytes: int) -> list[RamRange]:
    """Return ranges that cover one block exactly, as few as possible.

    The machine hides parts of RAM from the guest, and changes which parts at run time: under the
    ROMs below 1 MiB (PAM), and for system management mode (SMRAM). A hidden part lies where the
    range before it would go on, so each range is extended to the next.

    :param ranges: the ranges of the block that the guest sees now.
    :param size_bytes: size of the block.
    :raises Refused: the ranges do not fit together like that.
    """
    found = sorted(ranges, key=lambda r: r.offset_bytes)
    ends = [r.offset_bytes for r in found[1:]] + [size_bytes]
    if not found or found[0].offset_bytes:
        raise Refused("a RAM block of the guest is not mapped from its start")
    whole: list[RamRange] = []
    for part, end in zip(found, ends, strict=True):
        grown = replace(part, size_bytes=end - part.offset_bytes)
        if grown.size_bytes < part.size_bytes:
            raise Refused(f"RAM block {part.block} is mapped twice at offset {end:#x}")
        if whole and whole[-1].end == grown.address:
            whole[-1] = replace(whole[-1], size_bytes=whole[-1].size_bytes + grown.size_bytes)
        else:
            whole.append(grown)
    if any(a.end > b.address for a, b in pairwise(sorted(whole, key=lambda r: r.address))):
        raise Refused("a RAM block of the guest has two places at one address")
    return whole

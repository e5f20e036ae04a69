"""The parser of QEMU's memory tree: the place of a guest's RAM, or a refusal; never a wrong
place."""

from __future__ import annotations

from itertools import pairwise

from hintfleet.errors import Refused
from hintfleet.units import GIB
from host_agent.guests.libvirt.mtree import RamRange, parse, whole_block
from tests.fuzz.target import DATA, Target


def try_input(data: bytes) -> None:
    try:
        ranges = parse(data.decode(errors="replace"))
    except Refused as error:
        str(error).encode()
        return
    blocks: dict[str, list[RamRange]] = {}
    for part in ranges:
        assert part.size_bytes > 0
        assert 0 <= part.address < part.end <= 1 << 64
        assert part.offset_bytes >= 0
        blocks.setdefault(part.block, []).append(part)
    assert all(a.end <= b.address for a, b in pairwise(ranges))
    for parts in blocks.values():
        for size_bytes in (GIB, 5 * GIB, max(p.offset_bytes + p.size_bytes for p in parts)):
            _covers_the_block(parts, size_bytes)


def _covers_the_block(parts: list[RamRange], size_bytes: int) -> None:
    """Check that each byte of the block has one address, and that visible bytes keep theirs."""
    try:
        whole = whole_block(parts, size_bytes)
    except Refused as error:
        str(error).encode()
        return
    assert [part.offset_bytes for part in whole] == [0, *_ends(whole)[:-1]]
    assert _ends(whole)[-1] == size_bytes
    by_address = sorted(whole, key=lambda part: part.address)
    assert all(a.end <= b.address for a, b in pairwise(by_address))
    for seen in parts:
        (around,) = (w for w in whole if w.address <= seen.address < w.end)
        assert seen.end <= around.end
        assert seen.address - around.address == seen.offset_bytes - around.offset_bytes


def _ends(parts: list[RamRange]) -> list[int]:
    return [part.offset_bytes + part.size_bytes for part in parts]


_VIEW = b'FlatView #0\r\n AS "memory", root: system\r\n Root memory region: system\r\n'
_LINE = b"  %016x-%016x (prio 0, ram): %s @%016x KVM\r\n"

TARGET = Target.of(
    try_input,
    seeds=(
        *(path.read_bytes() for path in sorted(DATA.glob("mtree-*"))),
        _VIEW + _LINE % (0, 2 * GIB - 1, b"pc.ram", 0),
        _VIEW
        + _LINE % (0, 2 * GIB - 1, b"pc.ram", 0)
        + _LINE % (4 * GIB, 7 * GIB - 1, b"pc.ram", 2 * GIB)
        + _LINE % (7 * GIB, 8 * GIB - 1, b"dimm0", 0),
    ),
    words=("FlatView #1\r\n", ' AS "memory",', "(prio 0, ram): ", " @", " KVM", "pc.ram", "f" * 16),
    max_bytes=4096,
    quick_runs=10_000,
)

"""`info mtree -f` of real guests (QEMU 7.2, q35) is parsed into RAM ranges."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import Refused
from hintfleet.units import GIB, MIB
from host_agent.guests.libvirt.mtree import RamRange, parse, whole_block

DATA = Path(__file__).parents[2] / "data"


def captured(name: str) -> str:
    # Read as bytes, because the parser must understand the monitor's line ends.
    return (DATA / name).read_bytes().decode()


def ram(address: int, size_bytes: int, offset_bytes: int, block: str = "pc.ram") -> RamRange:
    return RamRange(address=address, size_bytes=size_bytes, block=block, offset_bytes=offset_bytes)


def test_1_gib_before_the_firmware_ran() -> None:
    ranges = parse(captured("mtree-q35-1GiB.txt"))
    assert ranges == [ram(0, 0xC0000, 0), ram(MIB, GIB - MIB, MIB)]
    assert whole_block(ranges, GIB) == [ram(0, GIB, 0)]


def test_1_gib_while_the_firmware_runs() -> None:
    ranges = parse(captured("mtree-q35-1GiB-in-firmware.txt"))
    assert len(ranges) > 2
    assert whole_block(ranges, GIB) == [ram(0, GIB, 0)]


def test_5_gib_lie_below_and_above_4_gib() -> None:
    ranges = parse(captured("mtree-q35-5GiB.txt"))
    assert whole_block(ranges, 5 * GIB) == [ram(0, 2 * GIB, 0), ram(4 * GIB, 3 * GIB, 2 * GIB)]


def test_other_blocks_and_accelerators() -> None:
    text = captured("mtree-q35-1GiB.txt").replace(
        "(prio 0, ram): pc.ram @0000000000100000",
        "(prio 0, ram): pc.ram @0000000000100000 KVM\r\n"
        "  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram KVM",
    )
    assert parse(text)[1:] == [
        ram(MIB, GIB - MIB, MIB),
        ram(0xFD000000, 16 * MIB, 0, "vga.vram"),
    ]


def test_a_tree_without_guest_memory_is_refused() -> None:
    with pytest.raises(Refused, match='no address space "memory"'):
        parse('FlatView #0\r\n AS "I/O", root: io\r\n Root memory region: io\r\n')


def test_a_block_that_does_not_begin_at_its_start() -> None:
    with pytest.raises(Refused, match="from its start"):
        whole_block([ram(MIB, MIB, MIB)], 2 * MIB)


def test_a_block_that_is_mapped_twice() -> None:
    with pytest.raises(Refused, match="twice"):
        whole_block([ram(0, 2 * MIB, 0), ram(GIB, MIB, MIB)], 2 * MIB)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.data())
def test_hidden_parts_are_covered(sizes: list[int], data: st.DataObject) -> None:
    """Cut a block anywhere, hide the end of each part: all of the block is found again."""
    total = sum(sizes)
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    visible = [data.draw(st.integers(1, size)) for size in sizes]
    seen = [ram(s * MIB, v * MIB, s * MIB) for s, v in zip(starts, visible, strict=True)]
    assert whole_block(seen, total * MIB) == [ram(0, total * MIB, 0)]


def test_a_view_that_is_not_flat() -> None:
    text = captured("mtree-q35-1GiB.txt")
    line = "  0000000000100000-000000003fffffff (prio 0, ram): pc.ram @0000000000100000"
    assert line in text
    with pytest.raises(Refused, match="overlap"):
        parse(text.replace(line, f"{line}\r\n{line}"))
    with pytest.raises(Refused, match="flat view"):
        parse(text.replace(line, line.replace("3fffffff", "000fffff")))


def test_a_block_whose_hidden_part_would_lie_upon_another() -> None:
    with pytest.raises(Refused, match="two places at one address"):
        whole_block([ram(0, MIB, 0), ram(2 * MIB, MIB, 4 * MIB)], 5 * MIB)

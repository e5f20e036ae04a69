"""Reading of files of /proc and /sys; some of them are real ones of a machine of 24 GiB."""

import os
import re
import struct
from pathlib import Path

import pytest

from guest_agent.memory.kernel import (
    KPF_HUGE,
    FreeLists,
    PageFlags,
    free_chunk_count,
    parse_buddyinfo,
    parse_zoneinfo,
    present_spans,
)
from guest_agent.procfs import parse_kib
from hintfleet.errors import Refused

DATA = Path(__file__).parents[2] / "data"


def test_zoneinfo_of_a_machine_with_three_zones() -> None:
    zones = parse_zoneinfo((DATA / "zoneinfo-24GiB.txt").read_text())
    assert [(z.name, z.start_pfn) for z in zones] == [
        ("DMA", 1),
        ("DMA32", 4096),
        ("Normal", 1048576),
    ]
    sparse = zones[1]
    assert sparse.present_pages < sparse.spanned_pages, "a hole below 4 GiB"
    assert sum(z.present_pages for z in zones) * 4096 == pytest.approx(24 << 30, rel=0.001)


def test_buddyinfo_counts_whole_chunks_only() -> None:
    lists = parse_buddyinfo((DATA / "buddyinfo-24GiB.txt").read_text())
    assert set(lists) == {(0, "DMA"), (0, "DMA32"), (0, "Normal")}
    counts = lists[0, "DMA32"]
    assert free_chunk_count([counts], 9) == counts[9] + 2 * counts[10]
    assert free_chunk_count([[9] * 9 + [0, 0]], 9) == 0


def test_free_lists_are_read_at_every_call(tmp_path: Path) -> None:
    path = tmp_path / "buddyinfo"
    path.write_text((DATA / "buddyinfo-24GiB.txt").read_text())
    counts = parse_buddyinfo(path.read_text()).values()
    lists = FreeLists(9, str(path))
    try:
        for _ in range(2):
            assert lists.free_chunk_count() == free_chunk_count(counts, 9) > 0
        # More nodes than fit into one read of /proc/buddyinfo.
        line = "Node {}, zone   Normal" + 11 * " {:6}" + " \n"
        path.write_text("".join(line.format(node, *[node] * 11) for node in range(256)))
        assert lists.free_chunk_count() == 3 * sum(range(256))
    finally:
        lists.close()


@pytest.mark.parametrize("text", ["", "Node 0, zone      DMA\n", "rubbish\n" * 10])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_zoneinfo(text)
    with pytest.raises(Refused):
        parse_buddyinfo(text)


def test_a_zone_without_one_of_its_numbers_is_refused() -> None:
    text = (DATA / "zoneinfo-24GiB.txt").read_text().replace("        spanned", "        spannt")
    with pytest.raises(Refused, match="not understood"):
        parse_zoneinfo(text)


@pytest.mark.parametrize("pages", ["9" * 5000, "9" * 20, "1"])
def test_an_impossible_zone_is_refused(pages: str) -> None:
    text = (DATA / "zoneinfo-24GiB.txt").read_text()
    with pytest.raises(Refused, match="not understood"):
        parse_zoneinfo(re.sub(r"spanned  \d+", f"spanned  {pages}", text))
    with pytest.raises(Refused, match="not understood"):
        parse_buddyinfo("Node 0, zone DMA " + "9" * 5000 + "\n")


@pytest.mark.parametrize("line", ["MemFree:", "MemFree: kB", "MemFree: x kB", "MemFreely: 1 kB"])
def test_a_line_without_its_number_is_refused(line: str) -> None:
    with pytest.raises(Refused, match="/proc/meminfo has no MemFree"):
        parse_kib(f"MemTotal: 4 kB\n{line}\n".encode(), "MemFree", "/proc/meminfo")


def memory_blocks(sys_root: Path, *numbers: int) -> Path:
    blocks = sys_root / "devices/system/memory"
    blocks.mkdir(parents=True)
    (blocks / "block_size_bytes").write_text("8000000\n")
    for name in ("power", "auto_online_blocks", *(f"memory{number}" for number in numbers)):
        (blocks / name).mkdir()
    return blocks


def test_a_sparse_guest_is_its_memory_blocks(tmp_path: Path) -> None:
    blocks = memory_blocks(tmp_path, 0, 1, 2, 8192)
    assert present_spans(tmp_path) == [range(3 * 32768), range(8192 * 32768, 8193 * 32768)]
    (blocks / "memory3").mkdir()  # block 3 is plugged
    (blocks / "memory8192").rmdir()
    assert present_spans(tmp_path) == [range(4 * 32768)]


def test_without_memory_blocks_the_spans_of_zones_are_used(tmp_path: Path) -> None:
    (tmp_path / "zoneinfo").write_text((DATA / "zoneinfo-24GiB.txt").read_text())
    assert [span.start for span in present_spans(tmp_path, tmp_path)] == [1, 4096, 1048576]


def test_one_entry_a_chunk_is_read(tmp_path: Path) -> None:
    path = tmp_path / "kpageflags"
    huge = {512, 2048, 4096}
    with path.open("wb") as file:
        for pfn in sorted(huge):
            file.seek(pfn * 8)
            file.write(struct.pack("=Q", 1 << KPF_HUGE | 1))
    flags = PageFlags(str(path))
    try:
        assert flags.chunks_with(KPF_HUGE, [range(3, 3000), range(3584, 6000)], 9) == sorted(huge)
        assert flags.chunks_with(KPF_HUGE, [range(600, 2048)], 9) == []
        assert flags.chunks_with(KPF_HUGE, [range(1 << 30, (1 << 30) + 1024)], 9) == []
    finally:
        flags.close()


def test_only_present_chunks_of_a_sparse_guest_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 GiB spread over 1 TiB take 2048 reads, as many as 4 GiB in one piece."""
    memory_blocks(tmp_path, *range(0, 8192, 256))
    with (tmp_path / "kpageflags").open("wb") as file:
        file.truncate(8 << 28)
        file.seek(256 * 32768 * 8)
        file.write(struct.pack("=Q", 1 << KPF_HUGE))
    read_at: list[int] = []
    pread = os.pread

    def counted(fd: int, size: int, at: int) -> bytes:
        read_at.append(at)
        return pread(fd, size, at)

    flags = PageFlags(str(tmp_path / "kpageflags"))
    monkeypatch.setattr(os, "pread", counted)
    try:
        assert flags.chunks_with(KPF_HUGE, present_spans(tmp_path), 9) == [256 * 32768]
    finally:
        flags.close()
    assert len(read_at) == 4 * 512


def test_memory_plugged_during_a_read_shifts_no_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that is not in /proc/kpageflags yet must not get the flags of the next one."""
    path = tmp_path / "kpageflags"
    path.write_bytes(b"".join(struct.pack("=Q", (pfn == 1024) << KPF_HUGE) for pfn in range(2048)))
    pread = os.pread
    not_there_yet = [512 * 8]

    def as_it_comes(fd: int, size: int, at: int) -> bytes:
        if at in not_there_yet:
            not_there_yet.remove(at)
            return b""
        return pread(fd, size, at)

    flags = PageFlags(str(path))
    monkeypatch.setattr(os, "pread", as_it_comes)
    try:
        assert flags.chunks_with(KPF_HUGE, [range(2048)], 9) == [1024]
        assert not not_there_yet
    finally:
        flags.close()


def test_no_page_flags(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot read") as caught:
        PageFlags(str(tmp_path / "kpageflags"))
    assert "CONFIG_PROC_PAGE_MONITOR" in str(caught.value)

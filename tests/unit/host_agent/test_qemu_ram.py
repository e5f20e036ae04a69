"""The mappings of a process are read from /proc/PID/maps."""

import mmap
import os
from pathlib import Path

import pytest

from host_agent.guests.libvirt import qemu_ram
from host_agent.guests.libvirt.qemu_ram import Mapping, mappings, parse_maps


def test_a_line_of_each_kind() -> None:
    anonymous, ram = parse_maps(
        "7f0000000000-7f0000001000 ---p 00000000 00:00 0\n"
        "7f0040000000-7f0080000000 rw-s 00001000 00:01 1029       /memfd:pc.ram (deleted)\n"
    )
    assert not anonymous.shared
    assert anonymous.path == ""
    assert ram == Mapping(
        start=0x7F0040000000,
        end=0x7F0080000000,
        shared=True,
        offset_bytes=4096,
        inode=1029,
        path="/memfd:pc.ram (deleted)",
    )


def test_only_whole_lines_are_mappings() -> None:
    line = "7f0040000000-7f0080000000 rw-s 00000000 00:01 1029 /memfd:pc.ram"
    assert not parse_maps(
        f"x{line}\n7f0040000000-7f0080000000 rw-s 00000000 00:01 \u0661 /memfd:a\n"
    )
    assert len(parse_maps(line)) == 1


def test_a_file_name_can_hold_anything_but_a_line_feed(tmp_path: Path) -> None:
    """A carriage return begins no line, and bytes that are no text are accepted."""
    forged = b"7f0040000000-7f0080000000 rw-s 00000000 00:01 1029 memfd:pc.ram"
    path = os.path.join(os.fsencode(tmp_path), b"\xff\r" + forged)
    with open(path, "w+b") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            found = mappings(os.getpid())
        inode = os.fstat(file.fileno()).st_ino
    assert [m.inode for m in found if m.path.endswith("memfd:pc.ram")] == [inode]


def test_a_file_that_is_closed_meanwhile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU opens and closes a socket each time its guest tries to connect."""
    ram = os.memfd_create("ram")
    os.truncate(ram, 4096)
    with mmap.mmap(ram, 4096):
        (mapping,) = (m for m in mappings(os.getpid()) if m.inode == os.fstat(ram).st_ino)
    readlink = os.readlink
    gone: list[str] = []

    def first_is_gone(path: str) -> str:
        if not gone:
            gone.append(path)
            raise FileNotFoundError(path)
        return readlink(path)

    monkeypatch.setattr(os, "readlink", first_is_gone)
    fd = qemu_ram._open_file(os.getpid(), mapping)
    assert gone
    assert os.fstat(fd).st_ino == mapping.inode
    os.close(fd)
    os.close(ram)

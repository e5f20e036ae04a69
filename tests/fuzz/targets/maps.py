"""The parser of /proc/PID/maps, compared with proc(5) read column by column."""

from __future__ import annotations

import re

from hintfleet.errors import Refused
from host_agent.guests.libvirt.qemu_ram import Mapping, parse_maps
from tests.fuzz.target import Target

_LINES = b"""\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0040000000 rw-s 00000000 00:01 1029                       /memfd:pc.ram (deleted)
7f0040000000-7f0040001000 ---p 00000000 00:00 0
7f1000000000-7f1000010000 r--p 00010000 fe:00 131 /usr/lib/a b\\012c.so
"""


def _mapping(line: str) -> Mapping | None:
    """Return the mapping of a line as the kernel writes it (fs/proc/task_mmu.c, show_map_vma); else
    None."""
    columns = line.split(" ", 5)
    try:
        span, permissions, offset, device, inode = columns[:5]
        start, end = span.split("-")
        major, minor = device.split(":")
        numbers = [int(n, 16) for n in (start, end, offset, major, minor)]
    except ValueError:
        return None
    strict = set("0123456789abcdef")
    plain = all(n and set(n) <= strict for n in (start, end, offset, major, minor))
    known = {a + b + c + d for a in "r-" for b in "w-" for c in "x-" for d in "sp"}
    if not plain or permissions not in known or not re.fullmatch("[0-9]{1,20}", inode):
        return None
    return Mapping(
        start=numbers[0],
        end=numbers[1],
        shared=permissions[3] == "s",
        offset_bytes=numbers[2],
        inode=int(inode),
        path="".join(columns[5:]).lstrip(" "),
    )


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    wanted = [_mapping(line) for line in text.split("\n")]
    try:
        found = parse_maps(text)
    except Refused:
        assert None in wanted
        return
    assert found == [mapping for mapping in wanted if mapping is not None]


TARGET = Target.of(
    try_input,
    seeds=(_LINES, *_LINES.splitlines()),
    words=(
        "9-9 rwxs 9 9:9 9",
        "rw-s",
        "---p",
        "/memfd:",
        "(deleted)",
        "00:01",
        " 0 ",
        "\u0661",
        "\u2028",
    ),
    max_bytes=1024,
    quick_runs=40_000,
)

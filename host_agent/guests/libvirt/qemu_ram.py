"""Finds a QEMU guest's RAM as parts of files: which file, and which offset in it.

Three sources must agree before a page may be punched: QEMU's memory tree, its address translation,
and the kernel's list of what QEMU has mapped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hintfleet.errors import GuestLost, Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import PAGE_BYTES
from host_agent.guests.libvirt import mtree
from host_agent.memory.ram import Segment

BACKING_HINT = (
    "give the domain shared memory of its own: <memoryBacking><source type='memfd'/>"
    "<access mode='shared'/></memoryBacking>"
)

_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) [r-][w-][x-]([sp]) ([0-9a-f]+) [0-9a-f]+:[0-9a-f]+ "
    r"([0-9]{1,20})(?: +(.*))?$",
    re.MULTILINE,
)
_HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]+)")


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """One line of /proc/PID/maps; see proc(5)."""

    start: int
    end: int
    shared: bool
    offset_bytes: int
    inode: int
    path: str


def parse_maps(text: str) -> list[Mapping]:
    """Return the mappings in the text of /proc/PID/maps."""
    return [
        Mapping(
            start=int(start, 16),
            end=int(end, 16),
            shared=sharing == "s",
            offset_bytes=int(offset, 16),
            inode=int(inode),
            path=path,
        )
        for start, end, sharing, offset, inode, path in _MAPPING.findall(text)
    ]


def mappings(pid: int) -> list[Mapping]:
    """Return the mappings of a running process."""
    # As bytes: the kernel escapes line feeds in file names, but neither carriage returns nor
    # bytes that are not UTF-8.
    return parse_maps(Path(f"/proc/{pid}/maps").read_bytes().decode(errors="replace"))


def process_of_thread(thread_id: int, guest_uuid: str) -> int:
    """Return the process id of the QEMU that has the thread `thread_id`.

    :raises Refused: it is not the guest's QEMU. The URI may be that of a remote libvirt.
    """
    try:
        status = Path(f"/proc/{thread_id}/status").read_text()
        pid = int(status.partition("Tgid:")[2].split(None, 1)[0])
        command_line = Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        command_line = ""
    if guest_uuid not in command_line:
        raise Refused(
            f"QEMU of guest {guest_uuid} does not run on this machine",
            hint="run hintfleet-host on the machine that runs libvirt",
        )
    return pid


def open_segments(
    pid: int, memory_bytes: int, hmp: Callable[[str], str], *, besides: RangeSet = EMPTY
) -> list[Segment]:
    """Open the RAM of the QEMU process `pid`.

    :param memory_bytes: size of the guest's memory; all of it must be found.
    :param besides: RAM that is known already, and left out.
    :param hmp: runs a command of QEMU's human monitor and returns its output.
    :raises Refused: a part of the guest's memory is not in shared memfds of its own, or not
        where it is expected; says what to change. No file stays open.
    :raises GuestLost: the process is gone.
    """
    try:
        maps = mappings(pid)
        ranges = [
            part
            for part in mtree.parse(hmp("info mtree -f"))
            if part.address // PAGE_BYTES not in besides
        ]
        segments = list(_segments(pid, ranges, maps, hmp))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestLost(f"QEMU process {pid} is gone") from error
    except PermissionError as error:
        raise Refused(
            f"cannot look into QEMU process {pid}: {error.strerror}",
            hint="run hintfleet-host as root, or use qemu:///session",
        ) from error
    found_bytes = sum(segment.page_count for segment in segments) * PAGE_BYTES
    if found_bytes != memory_bytes:
        for fd in {segment.fd for segment in segments}:
            os.close(fd)
        raise Refused(
            f"{found_bytes} of the guest's {memory_bytes} bytes of memory are in shared memfds",
            hint=BACKING_HINT,
        )
    return segments


def _segments(
    pid: int, ranges: list[mtree.RamRange], maps: list[Mapping], hmp: Callable[[str], str]
) -> Iterator[Segment]:
    opened: list[int] = []
    try:
        for _, parts in groupby(sorted(ranges, key=lambda r: r.block), key=lambda r: r.block):
            block = list(parts)
            mapping = _backing(block, maps, hmp)
            # Not main memory, or not shared. If RAM is missing, the caller sees it by the sum.
            if mapping is None:
                continue
            fd = _open_file(pid, mapping)
            opened.append(fd)
            yield from _block_segments(block, mapping, fd)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise


def _backing(
    block: list[mtree.RamRange], maps: list[Mapping], hmp: Callable[[str], str]
) -> Mapping | None:
    """Return the one mapping of a shared memfd that has all ranges of a block; None if the block
    is not in a shared memfd."""
    found: set[Mapping] = set()
    for part in block:
        first = _host_address(part.address, hmp)
        if _host_address(part.end - 1, hmp) != first + part.size_bytes - 1:
            raise Refused(f"guest RAM at {part.address:#x} is in several pieces on the host")
        mapping = next((m for m in maps if m.start <= first < m.end), None)
        if mapping is None or not mapping.shared or not mapping.path.startswith("/memfd:"):
            return None
        if mapping.offset_bytes + first - mapping.start != part.offset_bytes:
            raise Refused(f"guest RAM at {part.address:#x} is not where QEMU's RAM block has it")
        found.add(mapping)
    if len(found) != 1:
        raise Refused(f"RAM block {block[0].block} is mapped in several pieces")
    return found.pop()


def _host_address(address: int, hmp: Callable[[str], str]) -> int:
    answer = hmp(f"gpa2hva {address:#x}")
    match = _HOST_ADDRESS.search(answer)
    if not match:
        raise Refused(f"QEMU cannot translate guest address {address:#x}: {answer.strip()}")
    return int(match[1], 16)


def _open_file(pid: int, mapping: Mapping) -> int:
    """Open the memfd behind a mapping for reading and writing."""
    # By inode, not by name: QEMU gives several memfds the same name.
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            if not os.readlink(entry.path).startswith("/memfd:"):
                continue
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
        # Closed since scandir: QEMU opens and closes files while it runs.
        except FileNotFoundError:
            continue
        if os.fstat(fd).st_ino == mapping.inode and _is_shmem(fd):
            return fd
        os.close(fd)
    raise Refused(
        f"the memfd of inode {mapping.inode} behind the guest's RAM cannot be used",
        hint=f"huge pages cannot be reclaimed in part; {BACKING_HINT}",
    )


def _is_shmem(fd: int) -> bool:
    # hugetlbfs has the size of its huge pages as block size here.
    return os.fstatvfs(fd).f_bsize == PAGE_BYTES


def _block_segments(block: list[mtree.RamRange], mapping: Mapping, fd: int) -> Iterator[Segment]:
    size = os.fstat(fd).st_size
    if size != mapping.offset_bytes + mapping.end - mapping.start or mapping.offset_bytes:
        raise Refused(f"RAM block {block[0].block} is only part of its file")
    for part in mtree.whole_block(block, size):
        yield Segment(
            pfn=part.address // PAGE_BYTES,
            page_count=part.size_bytes // PAGE_BYTES,
            fd=fd,
            offset_bytes=part.offset_bytes,
        )

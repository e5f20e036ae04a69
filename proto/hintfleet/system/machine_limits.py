"""How much memory and how many processors of its machine this process may use.

Each result is a minimum: of what the machine has (for processors: of those that the process's CPU
affinity allows), and of what the process's cgroup and each cgroup above it allow, v1 and v2
(cgroups(7)). In a container, the cgroups above the container's own are not visible, so their limits
are not found. The exception is the memory limit of v1, which the kernel also reports in the
container's own cgroup. All files are read below a given root, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from hintfleet.errors import Refused
from hintfleet.system.cgroups import hierarchies

_ROOT = Path("/")
_MEMORY_LIMITS = ("memory.limit_in_bytes", "memory.max", "memory.high")
"""Files with a memory limit: the first of v1, the others of v2.

memory.high counts as a limit: the kernel slows down a process above it until it almost stops."""
_MEMORY_USAGE = ("memory.usage_in_bytes", "memory.current")
_OR_RAISE = ", or raise the memory limit of that cgroup (docker run --memory, systemd MemoryMax=)"

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Bound(Generic[_Number]):
    """The most that this process may use: bytes of memory, or processors.

    :ivar cgroup: folder of the cgroup in which the limit was found; empty if not in a cgroup.
    """

    value: _Number
    cgroup: str = ""

    @property
    def where(self) -> str:
        """Words for a message: in which cgroup the bound was found, or on this machine."""
        return f"in cgroup {self.cgroup}" if self.cgroup else "on this machine"

    @property
    def or_raise(self) -> str:
        """The end of a hint: how to raise the cgroup's memory limit; empty without a cgroup."""
        return _OR_RAISE if self.cgroup else ""


def total_memory(root: Path = _ROOT) -> Bound[int]:
    """Return the bytes of memory that this process may use, those in use now included.

    :raises Refused: this kernel does not report MemTotal.
    """
    found = [Bound(value=_meminfo_bytes("MemTotal", root))]
    for folder in _cgroups("memory", root):
        found += [Bound(value=limit, cgroup=str(folder)) for limit in _memory_limits(folder, root)]
    return min(found, key=lambda bound: bound.value)


def available_memory(root: Path = _ROOT) -> Bound[int]:
    """Return the bytes of memory that this process could still allocate without swapping.

    :raises Refused: this kernel does not report MemAvailable.
    """
    found = [Bound(value=_meminfo_bytes("MemAvailable", root))]
    for folder in _cgroups("memory", root):
        used = _used_bytes(_below(root, folder))
        for limit in _memory_limits(folder, root):
            found.append(Bound(value=max(0, limit - used), cgroup=str(folder)))
    return min(found, key=lambda bound: bound.value)


def processors(root: Path = _ROOT) -> Bound[float]:
    """Return how many processors this process may use at once; not always a whole number."""
    found = [Bound(value=float(len(os.sched_getaffinity(0))))]
    for folder in _cgroups("cpu", root):
        quota = _cpu_quota(_below(root, folder))
        if quota is not None:
            found.append(Bound(value=quota, cgroup=str(folder)))
    return min(found, key=lambda bound: bound.value)


def _meminfo_bytes(field: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise Refused(f"/proc/meminfo has no {field}")


def _memory_limits(folder: PurePosixPath, root: Path) -> list[int]:
    there = _below(root, folder)
    limits = [_number(there / name) for name in _MEMORY_LIMITS]
    # v1 only: the minimum over this cgroup and all above it, also those that a container cannot
    # see.
    limits.append(_memory_stat(there).get("hierarchical_memory_limit"))
    return [limit for limit in limits if limit is not None]


def _used_bytes(folder: Path) -> int:
    """Return the bytes that a cgroup uses, without inactive page cache and half of the active."""
    # What is left out is easy to free; half of the active cache is a guess similar to that
    # of MemAvailable (si_mem_available() in mm/show_mem.c). The pages of a memfd are shmem, so
    # neither inactive_file nor active_file contains them.
    usage = next(filter(None, (_number(folder / name) for name in _MEMORY_USAGE)), 0)
    stat = _memory_stat(folder)
    # v1 has each field with and without `total_`; only those with it include the cgroups below.
    # v2 has only fields without `total_`, which include the cgroups below.
    inactive, active = (
        stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file")
    )
    return usage - inactive - active // 2


def _memory_stat(folder: Path) -> dict[str, int]:
    fields = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return {field[0]: int(field[1]) for field in fields if len(field) == 2}


def _cpu_quota(folder: Path) -> float | None:
    """Return a cgroup's CPU quota as a number of processors; None if it has no quota."""
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if v2 := _text(folder / "cpu.max").split():
        quota, period = (int(field) if field.isdecimal() else None for field in v2)
    return quota / period if quota and period and quota > 0 else None


def _cgroups(controller: str, root: Path) -> Iterator[PurePosixPath]:
    """Yield the folders of this process's cgroup and of those above it, from the top, for each
    hierarchy that is v2 or has `controller`."""
    for hierarchy in hierarchies(root):
        if hierarchy.is_v2 or controller in hierarchy.controllers:
            yield from hierarchy.from_the_top()


def _below(root: Path, path: PurePosixPath) -> Path:
    return root / path.relative_to("/")


def _number(path: Path) -> int | None:
    """Return the number in a file; None if it cannot be read or has no number (`max`)."""
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

"""What this process may use of its machine: memory and processors.

That is the least of what the machine has and of what each cgroup above the process allows, of
v1 and v2 (cgroups(7)). In a container the mount shows the container's own cgroup as its root
(mountinfo), and what is above that cannot be seen. The files are read below a given root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from hintfleet.errors import Refused

_ROOT = Path("/")
_MEMORY_LIMITS = ("memory.limit_in_bytes", "memory.max", "memory.high")
"""v1's, then v2's; above memory.high a process is all but stopped."""
_MEMORY_USAGE = ("memory.usage_in_bytes", "memory.current")
_OR_RAISE = ", or raise the memory limit of that cgroup (docker run --memory, systemd MemoryMax=)"
_OCTAL = re.compile(r"\\([0-7]{3})")

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Bound(Generic[_Number]):
    """The most that this process may use.

    :ivar cgroup: folder of the cgroup that says so; empty if it is what the machine has.
    """

    value: _Number
    cgroup: str = ""

    @property
    def where(self) -> str:
        """For a message: whose bound it is."""
        return f"in cgroup {self.cgroup}" if self.cgroup else "on this machine"

    @property
    def or_raise(self) -> str:
        """The end of a hint: how a cgroup's bound on memory can be raised."""
        return _OR_RAISE if self.cgroup else ""


def total_memory(root: Path = _ROOT) -> Bound[int]:
    """Bytes of memory that it may use, whatever is used now.

    :raises Refused: this kernel does not say.
    """
    found = [Bound(value=_meminfo_bytes("MemTotal", root))]
    for folder in _cgroups("memory", root):
        found += [Bound(value=limit, cgroup=str(folder)) for limit in _memory_limits(folder, root)]
    return min(found, key=lambda bound: bound.value)


def available_memory(root: Path = _ROOT) -> Bound[int]:
    """Bytes of memory that it could come to use now, without swapping.

    :raises Refused: this kernel does not say.
    """
    found = [Bound(value=_meminfo_bytes("MemAvailable", root))]
    for folder in _cgroups("memory", root):
        used = _used_bytes(_below(root, folder))
        for limit in _memory_limits(folder, root):
            found.append(Bound(value=max(0, limit - used), cgroup=str(folder)))
    return min(found, key=lambda bound: bound.value)


def processors(root: Path = _ROOT) -> Bound[float]:
    """Processors that it may use at once; a quota may be a part of one."""
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
    # v1: the least of all above, also of those that a container cannot see.
    limits.append(_memory_stat(there).get("hierarchical_memory_limit"))
    return [limit for limit in limits if limit is not None]


def _used_bytes(folder: Path) -> int:
    """What a cgroup uses and would not give up: all but the reclaimable part of its page cache.

    As the kernel's own MemAvailable (si_mem_available() in mm/show_mem.c), leave it half of the
    cache that is in active use. The pages of a memfd are no such cache.
    """
    usage = next(filter(None, (_number(folder / name) for name in _MEMORY_USAGE)), 0)
    stat = _memory_stat(folder)
    # v1 has both, and only total_* counts the cgroups below; v2 counts them in any case.
    inactive, active = (
        stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file")
    )
    return usage - inactive - active // 2


def _memory_stat(folder: Path) -> dict[str, int]:
    fields = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return {field[0]: int(field[1]) for field in fields if len(field) == 2}


def _cpu_quota(folder: Path) -> float | None:
    """Processors that a cgroup's quota makes up; None if it has none."""
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if v2 := _text(folder / "cpu.max").split():
        quota, period = (int(field) if field.isdecimal() else None for field in v2)
    return quota / period if quota and period and quota > 0 else None


def _cgroups(controller: str, root: Path) -> Iterator[PurePosixPath]:
    """Folders of all cgroups above this process that can be seen, and of its own, from the top.

    Some may not be there: a container may be told of a path that only the host has.
    """
    for kind, own in _own_cgroups(controller, root):
        mounts = list(_mounts(kind, controller, root))
        inside = [(at, own.relative_to(top)) for top, at in mounts if own.is_relative_to(top)]
        # A mount from outside of our cgroup namespace has a root such as /.., and shows one of
        # those above us at its top; a container's may have a root that the path does not name.
        for at, rest in inside[:1] or [(at, PurePosixPath()) for _, at in mounts[:1]]:
            yield from reversed([at / part for part in (rest, *rest.parents)])


def _own_cgroups(controller: str, root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """Kind of hierarchy and path in it; see /proc/PID/cgroup in cgroups(7)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield "cgroup2", PurePosixPath(path)
        elif controller in controllers.split(","):
            yield "cgroup", PurePosixPath(path)


def _mounts(
    kind: str, controller: str, root: Path
) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Of a hierarchy: what each mount has as its root, and where; proc(5) on mountinfo."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        found, _, options = filesystem.split(" ", 2)
        if found == kind and (kind == "cgroup2" or controller in options.split(",")):
            top, at = mount.split()[3:5]
            yield PurePosixPath(_unescaped(top)), PurePosixPath(_unescaped(at))


def _unescaped(path: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), path)


def _below(root: Path, path: PurePosixPath) -> Path:
    return root / path.relative_to("/")


def _number(path: Path) -> int | None:
    """What a file says; None if it is not there, or says `max`."""
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

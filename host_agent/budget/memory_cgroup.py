"""A memory cgroup of a host agent, in which its guests run: the kernel keeps them within a limit.

Until it removes its cgroup or ends, a host agent holds a lock on the cgroup's folder (for domains,
on the folder in the memory hierarchy). `OwnedFolders` says when a folder is abandoned.
Sources: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of the kernel.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.settings import Driver
from hintfleet.system.cgroups import Hierarchy, hierarchies
from hintfleet.system.file_lock import lock_folder
from hintfleet.system.files import write_kernel_file
from hintfleet.system.owned_folders import OwnedFolders

PREFIX = "hintfleet-budget-"
# libvirt looks for partition /x (no dot in x) in the folder x.partition
# (virCgroupSetPartitionSuffix in src/util/vircgroup.c).
_PARTITION = ".partition"
_SYSTEMD = Path("/run/systemd/system")
_REMOVE_TIMEOUT_S = 2.0
_POLL_S = 0.05


class MemoryCgroup:
    """A memory cgroup with a limit. Make it with `make`, and end it with `remove`.

    :ivar folder: of the cgroup, in the hierarchy that limits memory.
    :ivar partition: its name for libvirt (`<resource><partition>`); empty if it is for embedded
        guests.
    """

    def __init__(self, folder: Path, partition: str, others: list[Path]) -> None:
        """Lock the folder. Call `make` instead: it makes the folder.

        :param others: the folders of the same name in other hierarchies.
        """
        self.folder = folder
        self.partition = partition
        self._others = others
        self._lock_fd = lock_folder(folder)
        self._is_v2 = (folder / "memory.max").exists()
        self._oom_fd = -1
        self._oom_count = 0

    @classmethod
    def make(cls, limit_bytes: int, driver: Driver) -> MemoryCgroup:
        """Make a memory cgroup for guests of this driver. After a failure no folder is left.

        For embedded guests it is below the cgroup of this process, for domains at the top of the
        hierarchy, where libvirt looks for partitions.

        :raises Refused: none can be made here; says why.
        """
        if _SYSTEMD.is_dir():
            # systemd wants to be the only one that makes cgroups (systemd.io/CGROUP_DELEGATION).
            raise Refused("systemd manages the cgroups of this machine")
        try:
            cgroup = cls._made(f"{PREFIX}{os.getpid()}-guests", driver)
        except OSError as error:
            raise Refused(f"{error.filename}: {error.strerror}") from error
        try:
            cgroup._limit(limit_bytes)
        except OSError as error:
            cgroup.remove()
            raise Refused(f"{error.filename}: {error.strerror}") from error
        return cgroup

    @classmethod
    def _made(cls, name: str, driver: Driver) -> MemoryCgroup:
        found = list(hierarchies())
        memory = _with_memory(found)
        if driver is Driver.EMBEDDED:
            return cls(_new(memory, Path(memory.own) / name), "", [])
        # Make it in each hierarchy: libvirt wants the partition in all hierarchies that it uses.
        with contextlib.ExitStack() as undo:
            folders = {}
            for hierarchy in found:
                folders[hierarchy] = _new(hierarchy, Path(hierarchy.top) / f"{name}{_PARTITION}")
                undo.callback(folders[hierarchy].rmdir)
            undo.pop_all()
        return cls(folders.pop(memory), f"/{name}", list(folders.values()))

    def _limit(self, limit_bytes: int) -> None:
        if self._is_v2:
            write_kernel_file(self.folder / "memory.max", str(limit_bytes))
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                write_kernel_file(self.folder / "memory.swap.max", "0")
            return
        write_kernel_file(self.folder / "memory.limit_in_bytes", str(limit_bytes))
        with contextlib.suppress(FileNotFoundError, PermissionError):  # without swap accounting
            write_kernel_file(self.folder / "memory.memsw.limit_in_bytes", str(limit_bytes))
        self._watch_oom()

    def allow_swap(self, swap_bytes: int, limit_bytes: int) -> None:
        """Let at most `swap_bytes` of the processes' memory be swapped out; 0: nothing. Limit their
        other memory to `limit_bytes`, if `set_limit` can.

        :raises Refused: the kernel does not count swap for cgroups. Never if `swap_bytes` is 0.
        """
        try:
            if self._is_v2:
                write_kernel_file(self.folder / "memory.swap.max", str(swap_bytes))
            else:
                # v1 limits memory and swap together.
                both_bytes = limit_bytes + swap_bytes
                write_kernel_file(self.folder / "memory.memsw.limit_in_bytes", str(both_bytes))
        except OSError as error:
            if swap_bytes:
                raise Refused(f"no swap in cgroup {self.folder}: {error}") from error
        self.set_limit(limit_bytes)

    def set_limit(self, limit_bytes: int) -> bool:
        """Set the limit of memory; takes as long as the kernel needs to swap out what exceeds it.

        :returns: False if it cannot swap out enough in v1, and leaves the limit as it was. In v2 it
            kills a process instead.
        """
        name = "memory.max" if self._is_v2 else "memory.limit_in_bytes"
        try:
            write_kernel_file(self.folder / name, str(max(0, limit_bytes)))
        except OSError:
            return False
        return True

    def _watch_oom(self) -> None:
        # v1 counts a kill in the killed process's own cgroup, which libvirt removes with the
        # domain. So count events: they come for the cgroup whose limit was hit (memory.rst, "OOM
        # Control").
        self._oom_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        control = self.folder / "memory.oom_control"
        fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
        try:
            write_kernel_file(self.folder / "cgroup.event_control", f"{self._oom_fd} {fd}")
        finally:
            os.close(fd)

    def add(self, pid: int) -> None:
        """Put a process into the cgroup. Memory that it used before stays counted where it was.

        :raises Refused: the kernel does not take it.
        """
        try:
            write_kernel_file(self.folder / "cgroup.procs", str(pid))
        except OSError as error:
            raise Refused(f"cannot put process {pid} into cgroup {self.folder}: {error}") from error

    @property
    def used_bytes(self) -> int:
        """The memory that the cgroup uses, with its processes and the page cache of their files."""
        name = "memory.current" if self._is_v2 else "memory.usage_in_bytes"
        return int((self.folder / name).read_text())

    @property
    def oom_count(self) -> int:
        """How many processes of the cgroup the kernel has killed for lack of memory. In v1, how
        often the limit was hit and the kernel could free nothing, so that it had to kill one."""
        if self._is_v2:
            return _counted(self.folder / "memory.events", "oom_kill")
        with contextlib.suppress(BlockingIOError):
            self._oom_count += os.eventfd_read(self._oom_fd)
        return self._oom_count

    def remove(self) -> None:
        """Remove the cgroup, whose processes must have ended, and release its lock. May be called
        twice.

        A folder that the kernel refuses to remove for 2 s is left for `hintfleet doctor --clean`.
        """
        for folder in (self.folder, *self._others):
            _remove(folder)
        for fd in (self._lock_fd, self._oom_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._lock_fd = None
        self._oom_fd = -1


def abandoned() -> Iterator[Path]:
    """Yield the folders of cgroups whose host agents are gone. A partition has a folder in each
    hierarchy."""
    for hierarchy in hierarchies():
        # Not rglob: it fails if a cgroup is removed meanwhile (Python 3.11).
        found = (Path(at, name) for at, names, _ in os.walk(hierarchy.top) for name in names)
        yield from _abandoned(path for path in found if path.name.startswith(PREFIX))


def _abandoned(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if OwnedFolders(base=folder.parent, prefix=PREFIX).is_abandoned(folder):
            yield folder


def remove_folder(folder: Path) -> None:
    """Remove a cgroup without processes, and the cgroups in it: those of domains stay in a
    partition if libvirtd was killed, too.

    :raises OSError: the kernel refused one of them: a process is in it.
    """
    for at, _, _ in os.walk(folder, topdown=False):
        os.rmdir(at)


def _with_memory(found: list[Hierarchy]) -> Hierarchy:
    for hierarchy in found:
        if "memory" in hierarchy.controllers:
            return hierarchy
    for hierarchy in found:
        if hierarchy.is_v2 and "memory" in _words(Path(hierarchy.top) / "cgroup.controllers"):
            return hierarchy
    raise Refused("this kernel has no memory cgroups, or they are not mounted")


def _new(hierarchy: Hierarchy, folder: Path) -> Path:
    """Make a cgroup, so that processes can be put into it; return its folder. Before, remove the
    empty cgroups that killed host agents left beside it.

    :raises OSError: the kernel refused. The folder is not left.
    """
    for other in _abandoned(folder.parent.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):  # it has processes, or somebody else removes it now
            remove_folder(other)
    if hierarchy.is_v2 and "memory" in _words(folder.parent / "cgroup.controllers"):
        # Enable the memory controller in the parent's children. The kernel refuses that if the
        # parent itself has processes, except in the root ("no internal processes", cgroup-v2.rst).
        write_kernel_file(folder.parent / "cgroup.subtree_control", "+memory")
    folder.mkdir()
    try:
        # Until its cpus and mems are set, a cpuset cgroup of v1 takes no process.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if "cpuset" in hierarchy.controllers:
                write_kernel_file(folder / name, (folder.parent / name).read_text())
    except OSError:
        folder.rmdir()
        raise
    return folder


def _remove(folder: Path) -> None:
    give_up_s = time.monotonic() + _REMOVE_TIMEOUT_S
    while folder.exists():
        try:
            remove_folder(folder)
        except OSError:  # EBUSY for a moment after its last process has ended
            if time.monotonic() > give_up_s:
                return
            time.sleep(_POLL_S)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _counted(path: Path, name: str) -> int:
    fields = (line.split() for line in path.read_text().splitlines())
    return next((int(count) for field, count in fields if field == name), 0)

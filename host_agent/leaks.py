"""Finds what killed host agents left on this host: processes, domains, memory doors, cgroups, zram
devices, folders.

An embedded guest, and a host agent with --lifeline-fd, has a lifeline, a pipe. A guest's folder, a
cgroup and a zram device have a lock, and a domain has its console in a guest's folder. When the
owner dies, the kernel closes the other end of the pipe, or releases the lock. So these are leaks: a
process whose lifeline has no other end (or one that only leaked processes hold), a folder, cgroup
or zram device whose lock is free, the domain of such a folder, and a memory door on whose socket
nobody listens. Guests that a host agent has made under --state are not examined: each ends by
itself after --orphan-after.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from hintfleet.errors import HintfleetError
from hintfleet.leaks import Leak, Removable
from hintfleet.system.processes import Process, other_processes
from host_agent.budget.memory_cgroup import abandoned as abandoned_cgroups
from host_agent.budget.memory_cgroup import remove_folder
from host_agent.budget.zram import abandoned as abandoned_zram
from host_agent.budget.zram import remove as remove_zram
from host_agent.guests.libvirt.domain_leaks import abandoned_domains
from host_agent.guests.libvirt.runtime_dir import runtime_dirs

_MEMFD = "/memfd:hintfleet-"


def find(libvirt_uri: str) -> tuple[list[Removable], list[str]]:
    """Return the leaks, each with what removes it, in the order in which to remove them; and what
    could not be examined."""
    not_examined = []
    found = [*_processes(list(other_processes()))]
    try:
        found += abandoned_domains(libvirt_uri)
    except HintfleetError as error:
        not_examined.append(f"domains: {error.message}")
    found += _there(_cgroup, abandoned_cgroups())
    found += _there(_zram, abandoned_zram())
    found += _there(_folder, (path for dirs in runtime_dirs() for path in dirs.abandoned()))
    return found, not_examined


def _there(leak_of: Callable[[Path], Removable], paths: Iterable[Path]) -> Iterator[Removable]:
    """Yield the leaks at these paths, without those that are gone meanwhile."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield leak_of(path)


def _processes(seen: list[Process]) -> Iterator[Removable]:
    """Yield host agents and embedded guests that are leaked: nobody holds the other end of their
    lifeline, or only leaked processes hold it. If `_parent_is_hidden`, a process is left out."""
    links = {process: process.descriptor_targets() or {} for process in seen}
    lifelines = {
        process: links[process].get(fd, "")
        for process in seen
        if (fd := _lifeline_fd(process)) is not None
    }
    holders = {process: _holders(pipe, process, links) for process, pipe in lifelines.items()}
    leaked = {p for p, pipe in lifelines.items() if pipe.startswith("pipe:")}
    leaked -= {p for p in leaked if _parent_is_hidden(p, links)}
    while living_owner := {p for p in leaked if holders[p] - leaked}:
        leaked -= living_owner
    counted: set[str] = set()
    for process in sorted(leaked, key=lambda p: p.start_ticks):
        yield (
            Leak(
                what="host agent" if _is_host_agent(process) else "embedded guest",
                where=f"process {process.pid}",
                since_unix_s=process.started_unix_s,
                size_bytes=_memfd_bytes(process, links[process], counted),
                why="nobody holds the other end of its lifeline",
            ),
            process.end,
        )


def _lifeline_fd(process: Process) -> int | None:
    """Return the descriptor of a process's lifeline; None if the process has none, or is neither
    a host agent nor an embedded guest."""
    argv = process.argv
    if _is_host_agent(process) and "--lifeline-fd" in argv[:-1]:
        number = argv[argv.index("--lifeline-fd") + 1]
        return int(number) if number.isdecimal() else None
    # An embedded guest that leads a session of its own was started under --state (embedded.py:
    # start_new_session) and must outlive its host agent: the pipe at 0 is not its lifeline.
    if argv[-4:] == ("-m", "guest_agent", "--config", "-") and process.session != process.pid:
        return 0
    return None


def _is_host_agent(process: Process) -> bool:
    argv = process.argv
    return argv[1:3] == ("-m", "host_agent") or any(
        Path(argument).name == "hintfleet-host" for argument in argv[:2]
    )


def _holders(pipe: str, process: Process, links: dict[Process, dict[int, str]]) -> set[Process]:
    """Return the processes, except `process` itself, that can write to this pipe."""
    return {
        other
        for other, open_files in links.items()
        if other != process
        for fd, link in open_files.items()
        if link == pipe and other.can_write(fd)
    }


def _parent_is_hidden(process: Process, links: dict[Process, dict[int, str]]) -> bool:
    """Return whether the parent (except pid 1) may hold the other end of the lifeline, but we
    cannot read which files it has open."""
    # The parent may be another user's process (sudo, setuid): only root may read its /proc/PID/fd.
    if process.parent_pid == 1 or os.geteuid() == 0:
        return False
    return not any(p.pid == process.parent_pid and found for p, found in links.items())


def _memfd_bytes(process: Process, open_files: dict[int, str], counted: set[str]) -> int:
    """Return how much memory the RAM files take that the process has open and that are not in
    `counted` yet; add these files to `counted`."""
    size_bytes = 0
    for fd, link in open_files.items():
        if link.startswith(_MEMFD):
            try:
                status = os.stat(f"/proc/{process.pid}/fd/{fd}")
            except OSError:
                continue
            file = f"{status.st_dev}:{status.st_ino}"
            # st_blocks counts units of 512 bytes for every block size of the file system (stat(2)).
            size_bytes += 0 if file in counted else status.st_blocks * 512
            counted.add(file)
    return size_bytes


def _folder(path: Path) -> Removable:
    size_bytes = _size_bytes(path.rglob("*"))
    return _abandoned("guest's files", path, size_bytes), lambda: shutil.rmtree(path)


def _cgroup(path: Path) -> Removable:
    return _abandoned("cgroup", path), partial(remove_folder, path)


def _zram(device: Path) -> Removable:
    return _abandoned("zram swap", device), lambda: remove_zram(device)


def _abandoned(what: str, path: Path, size_bytes: int = 0) -> Leak:
    return Leak(
        what=what,
        where=str(path),
        since_unix_s=round(path.lstat().st_mtime),
        size_bytes=size_bytes,
        why="the host agent that made it is gone",
    )


def _size_bytes(paths: Iterable[Path]) -> int:
    sizes = []
    for path in paths:
        with suppress(FileNotFoundError):  # somebody else removes the folder now
            sizes.append(path.lstat().st_blocks * 512)
    return sum(sizes)

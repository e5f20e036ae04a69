"""Finds what killed runs left on this machine, and removes it on request.

This module finds Ray's processes, runtime folders, unfinished files in the store and, in a guest,
isolated huge pages, which it never removes. What killed host agents left is found and removed by a
host agent (`hintfleet-host --leaks`, `--clean`) in a process of its own. Nothing is removed that a
living process owns, or that may not be ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hintfleet.errors import HintfleetError
from hintfleet.leaks import Leak, Removable, remove_all
from hintfleet.system.file_lock import is_held
from hintfleet.system.processes import Process, other_processes
from orchestrator.doctor import ask_host_agent
from orchestrator.machine import runtime_dirs
from orchestrator.results.store.lock import try_lock
from orchestrator.results.store.samples import UNFINISHED
from orchestrator.results.store.writer import RESERVE

# The file that reserves the isolated huge pages (guest_agent/isolation/hugetlb_pool.py). It exists
# only if this machine is a guest.
_HUGETLB_FILE = Path("/run/hintfleet-hugetlb/isolated")
_RUNTIME_FOLDER = re.compile(r"(/[^\0 =]*/hf-[0-9]+-[a-z0-9_]+)/ray(?:/|$)")
_RAY_PROGRAM = re.compile(r"/ray/(?:core/src|autoscaler|dashboard|_private)/")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The leaks.

    :ivar not_looked_at: what could not be checked, and why.
    """

    leaks: list[Leak]
    not_looked_at: list[str]


def look_for_leaks(data_dir: Path, libvirt_uri: str = "", clean: bool = False) -> Found:
    """Return the leaks. With `clean`, try to remove those whose `kept` is empty; afterwards each
    leak has `removed` set, or the reason in `kept`.
    """
    act = remove_all if clean else _only_listed
    # End Ray's processes first: when an actor that hangs is ended, its end of the lifeline closes,
    # and then its host agent may end by itself.
    leaks = act(_ray_processes())
    of_host_agent, unseen = _of_host_agent(libvirt_uri, clean)
    leaks += of_host_agent
    leaks += act([*_folders(runtime_dirs().abandoned()), *_in_store(data_dir), *_huge_pages()])
    return Found(leaks=leaks, not_looked_at=unseen)


def _only_listed(found: Iterable[Removable]) -> list[Leak]:
    return [leak for leak, _ in found]


def _of_host_agent(libvirt_uri: str, clean: bool) -> tuple[list[Leak], list[str]]:
    try:
        answer = json.loads(ask_host_agent(libvirt_uri, "--clean" if clean else "--leaks"))
    except (HintfleetError, ValueError) as error:
        return [], [f"host agents, guests and domains: {error}"]
    return [Leak.from_json(leak) for leak in answer["leaks"]], answer["not_looked_at"]


def _ray_processes() -> Iterator[Removable]:
    for process in other_processes():
        folder = _runtime_folder(process)
        if folder is None or not _shares_namespaces(process):
            continue
        if runtime_dirs().is_abandoned(folder):
            leak = Leak(
                what="Ray process",
                where=f"process {process.pid}: {Path(process.argv[0].split()[0]).name}",
                since_unix_s=process.started_unix_s,
                size_bytes=_resident_bytes(process.pid),
                why=f"the run that used {folder} is gone",
            )
            yield leak, process.end


def _shares_namespaces(process: Process) -> bool:
    """Return whether a process is in our pid and mount namespaces."""
    # A path on the command line of a process in a container names another folder than here: the
    # run may be alive in the container although nobody uses the folder of that name here.
    try:
        return all(
            os.readlink(f"/proc/{process.pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")
            for kind in ("pid", "mnt")
        )
    except OSError:  # the process is gone, or another user's
        return False


def _runtime_folder(process: Process) -> Path | None:
    """Return the runtime folder of a Ray process that a run of ours started; None for any other
    process."""
    words = "\0".join(process.argv)
    # Ray's workers overwrite their command line with a title (setproctitle), `ray::NAME`. So search
    # their open files: their logs are in the runtime folder.
    if words.startswith("ray::"):
        words = "\0".join((process.descriptor_targets() or {}).values())
    elif not _RAY_PROGRAM.search(words):
        return None
    found = _RUNTIME_FOLDER.search(words)
    return Path(found[1]) if found else None


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _folders(paths: Iterable[Path]) -> Iterator[Removable]:
    for path in paths:
        why = "the process that created it is gone"
        yield from _file(path, "runtime folder", why, partial(shutil.rmtree, path))


def _in_store(data_dir: Path) -> Iterator[Removable]:
    for folder in sorted((data_dir / "samples").glob("*")):
        files = [*folder.glob(f"*/*{UNFINISHED}"), *folder.glob(RESERVE)]
        if files and _is_unlocked(folder):
            for path in files:
                why = f"nobody runs {folder.name}"
                yield from _file(path, "unfinished file", why, _unlink(path))


def _is_unlocked(run_folder: Path) -> bool:
    """Return whether nobody runs a run; False if that cannot be determined."""
    try:
        fd = try_lock(run_folder)
    except OSError:  # it is another user's: a lock file has mode 0600
        return False
    if fd is not None:
        os.close(fd)
    return fd is not None


def _unlink(path: Path) -> Callable[[], None]:
    """Return a function that removes an unfinished file of a run.

    The function raises BlockingIOError if the run goes on.
    """

    def unlink() -> None:
        # Take the lock again: the run may have been resumed since the file was listed.
        run_folder = path.parent if path.name == RESERVE else path.parent.parent
        fd = try_lock(run_folder)
        if fd is None:
            raise BlockingIOError("the run goes on")
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)

    return unlink


def _huge_pages() -> Iterator[Removable]:
    """Yield one leak for all huge pages that a guest agent isolated before it died; nothing if
    there are none, if this machine is no guest, or if we may not see them.

    It is only listed: `kept` is always set.
    """
    try:
        is_there = _HUGETLB_FILE.exists()
    except PermissionError:  # the folder is root's, with mode 0700
        return
    # A running guest agent with isolator hugetlb holds the lock /run/hintfleet-hugetlb.lock.
    if is_there and not is_held(_HUGETLB_FILE.parent.with_suffix(".lock")):
        kept = (
            "the host may still be punching them; start hintfleet-guest again: it gives them "
            "back when the host has finished"
        )
        why = "the guest agent that isolated them is gone"
        yield from _file(_HUGETLB_FILE, "huge pages", why, lambda: None, kept)


def _file(
    path: Path, what: str, why: str, remove: Callable[[], None], kept: str = ""
) -> Iterator[Removable]:
    """Yield the leak of a file, or of a folder with all that is in it; nothing if it is gone."""
    # It may be gone, or lose files, since it was found: host agents and processes of Ray of a
    # killed run may still be ending, and a run that starts removes what they left.
    with suppress(FileNotFoundError):
        leak = Leak(
            what=what,
            where=str(path),
            since_unix_s=round(path.lstat().st_mtime),
            size_bytes=_size_bytes(_files_in(path) if path.is_dir() else [path]),
            why=why,
            kept=kept,
        )
        yield leak, remove


def _files_in(folder: Path) -> Iterator[Path]:
    # Not rglob: it fails if a folder is removed meanwhile (Python 3.11).
    return (Path(at, name) for at, dirs, files in os.walk(folder) for name in (*dirs, *files))


def _size_bytes(files: Iterable[Path]) -> int:
    size_bytes = 0
    for file in files:
        with suppress(FileNotFoundError):
            # st_blocks counts units of 512 bytes, whatever the file system's block size (stat(2)).
            size_bytes += file.lstat().st_blocks * 512
    return size_bytes

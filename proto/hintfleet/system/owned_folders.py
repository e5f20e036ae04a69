"""Makes temporary folders that belong to one process each. Finds those whose process is gone, and
removes them before it makes another one.

A process holds a lock on its folder until it removes the folder or ends. Unlike a process id, the
lock shows whether the process runs even if the id was reused, or is of another container. The
process id in the folder's name is checked as well: it protects a folder that its process has made
but not yet locked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hintfleet.system.file_lock import lock_folder
from hintfleet.system.processes import find_process

_CLOCKS_AGREE_WITHIN_S = 1.0  # Process.started_unix_s is in whole seconds


@dataclass(frozen=True, kw_only=True)
class OwnedFolders:
    """All folders of one kind.

    :ivar base: the folder that they are made in.
    :ivar prefix: the start of their names.
    """

    base: Path
    prefix: str

    def make(self) -> OwnedFolder:
        """Remove abandoned folders; then make and lock a folder that only this user can read."""
        for path in self.abandoned():
            shutil.rmtree(path, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f"{self.prefix}{os.getpid()}-", dir=self.base))
        fd = lock_folder(path)
        return OwnedFolder(path, -1 if fd is None else fd)

    def abandoned(self) -> list[Path]:
        """Return this user's folders of this kind whose processes are gone."""
        return [
            path
            for path in self.base.glob(f"{self.prefix}*-*")
            if _is_mine(path) and self.is_abandoned(path)
        ]

    def is_abandoned(self, path: Path) -> bool:
        """Return whether the process that made the folder `path` is gone.

        True even if the folder itself is gone. False if that cannot be determined, or if the name
        of the folder is not of this kind.
        """
        pid = path.name.removeprefix(self.prefix).partition("-")[0]
        named = path.name.startswith(self.prefix) and pid.isdecimal()
        # Check the pid before trying the lock: a process that has made its folder and is about to
        # lock it must not find the folder locked by us.
        if not named or _may_have_made(int(pid), path):
            return False
        try:
            fd = lock_folder(path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        if fd is None:
            return False
        os.close(fd)
        return True


@dataclass
class OwnedFolder:
    """A folder of this process."""

    path: Path
    _fd: int

    def remove(self) -> None:
        """Remove the folder with its contents, and release its lock.

        The folder may be gone already; may be called twice.
        """
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _may_have_made(pid: int, path: Path) -> bool:
    """Return whether a process with this id runs, and started before `path` last changed.

    If `path` is gone, or the start time cannot be read, return whether such a process runs.
    """
    try:
        process = find_process(pid)
    except OSError:
        return True  # it runs, but we may not read its start time
    if process is None:
        return False
    try:
        changed_unix_s = path.lstat().st_mtime
    except OSError:
        return True
    # A process that started later has only reused the id.
    return process.started_unix_s <= changed_unix_s + _CLOCKS_AGREE_WITHIN_S


def _is_mine(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.geteuid()
    return False

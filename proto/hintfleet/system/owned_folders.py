"""Temporary folders of one process each, and those whose process is gone.

A process holds a lock on its folder while it lives. That tells also where process ids do
not: after one was used again, and between containers. The id, which is in the folder's
name, tells where the lock was not taken yet: it is looked at first, so that nobody takes
the lock from a process that is about to.
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

_CLOCKS_AGREE_WITHIN_S = 1.0  # when a process started is known in whole seconds


@dataclass(frozen=True, kw_only=True)
class OwnedFolders:
    """All of one kind.

    :ivar base: where they are made.
    :ivar prefix: what their names begin with.
    """

    base: Path
    prefix: str

    def make(self) -> OwnedFolder:
        """A new one, for this user alone. Abandoned ones are removed on this occasion."""
        for path in self.abandoned():
            shutil.rmtree(path, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f"{self.prefix}{os.getpid()}-", dir=self.base))
        fd = lock_folder(path)
        return OwnedFolder(path, -1 if fd is None else fd)

    def abandoned(self) -> list[Path]:
        """Those of processes that are gone; this user's only."""
        return [
            path
            for path in self.base.glob(f"{self.prefix}*-*")
            if _is_mine(path) and self.is_abandoned(path)
        ]

    def is_abandoned(self, path: Path) -> bool:
        """Whether it is the folder of a process that is gone; it may be gone itself."""
        pid = path.name.removeprefix(self.prefix).partition("-")[0]
        named = path.name.startswith(self.prefix) and pid.isdecimal()
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
        """Remove it with all that is in it; it may be gone already. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _may_have_made(pid: int, path: Path) -> bool:
    """Whether a process with this id lives that did not start after `path` had its last
    change. Without such a folder, whether one lives at all."""
    try:
        process = find_process(pid)
    except OSError:
        return True  # it is there, and not for us to see
    if process is None:
        return False
    try:
        changed_unix_s = path.lstat().st_mtime
    except OSError:
        return True
    return process.started_unix_s <= changed_unix_s + _CLOCKS_AGREE_WITHIN_S


def _is_mine(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.lstat().st_uid == os.geteuid()
    return False

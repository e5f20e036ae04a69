"""Locks on files and folders that end with their holder, however it ends (flock(2)).

A lock belongs to the open file. The kernel releases it when the last descriptor of that is
closed. For a killed process the kernel closes descriptors only after the system call that the
process is in has ended.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.05


def lock_file(path: Path) -> int | None:
    """Lock a file, and return the descriptor that holds the lock; None if it is locked
    already, by another process or through another descriptor of this one.

    Makes the file if it is not there.

    :raises OSError: the file can be neither opened nor made.
    """
    return _locked(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def lock_folder(path: Path) -> int | None:
    """Lock a folder, and return the descriptor that holds the lock; None if it is locked
    already, by another process or through another descriptor of this one.

    :raises OSError: there is no such folder, or we may not open it.
    """
    return _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))


def wait_for(lock: Callable[[], int | None], timeout_s: Callable[[], float]) -> int | None:
    """Call `lock` until it returns a descriptor; None if it does not in time. Blocks.

    :param timeout_s: return how long to wait in all; called after each try.
    """
    started_s = time.monotonic()
    while (fd := lock()) is None:
        if time.monotonic() - started_s > timeout_s():
            return None
        time.sleep(_POLL_S)
    return fd


def is_held(path: Path) -> bool:
    """Return whether another process holds the lock on a file; True if we may not open it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        # A shared lock: with an exclusive one, two callers would take each other for a holder.
        return not _try(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _locked(fd: int) -> int | None:
    try:
        if _try(fd, fcntl.LOCK_EX):
            return fd
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _try(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""Locks on files and folders (flock(2)); the kernel releases them, however their holder ends.

A lock belongs to an open file description (open(2)): the kernel releases the lock when the last
descriptor of that description is closed. When a process is killed, the kernel closes its
descriptors only after the system calls that its threads were in have ended.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.05


def lock_file(path: Path) -> int | None:
    """Lock a file exclusively, and return the descriptor that holds the lock.

    None if the file is locked already, by another process or through another descriptor of this
    process. Does not wait. Makes the file if it is not there.

    :raises OSError: the file can be neither opened nor made.
    """
    return _locked(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def lock_folder(path: Path) -> int | None:
    """Lock a folder exclusively, and return the descriptor that holds the lock.

    None if the folder is locked already, by another process or through another descriptor of this
    process. Does not wait.

    :raises OSError: there is no such folder, or we may not open it.
    """
    return _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))


def wait_for(lock: Callable[[], int | None], timeout_s: Callable[[], float]) -> int | None:
    """Call `lock` every 50 ms until it returns a descriptor, and return that; None on timeout.

    Blocks.

    :param timeout_s: returns the timeout, counted from the first try; called after each failed
        try, so the timeout may change meanwhile.
    """
    started_s = time.monotonic()
    while (fd := lock()) is None:
        if time.monotonic() - started_s > timeout_s():
            return None
        time.sleep(_POLL_S)
    return fd


def is_held(path: Path) -> bool:
    """Return whether a file is locked exclusively, as `lock_file` does it.

    False if there is no such file, True if it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        # Try a shared lock: with exclusive ones, one of two callers at the same time could take
        # the other for the holder.
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

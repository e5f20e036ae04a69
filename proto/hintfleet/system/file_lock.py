"""Locks on files and folders that end with their holder, however that ends (flock(2)).

A lock belongs to the open file: it is let go of when the last descriptor of it is closed, which
the kernel does for a process that is killed, too, once the system call that it is in is over.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.05


def lock_file(path: Path) -> int | None:
    """Return a descriptor that holds the lock on a file, made if need be; None if it is held.

    :raises OSError: the file can be neither opened nor made.
    """
    return _locked(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def lock_folder(path: Path) -> int | None:
    """Return a descriptor that holds the lock on a folder; None if it is held.

    :raises OSError: there is no such folder, or it is not for us to open.
    """
    return _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))


def wait_for(lock: Callable[[], int | None], patience_s: Callable[[], float]) -> int | None:
    """Try `lock` until it returns a descriptor; None if it has not after a while. Blocks.

    :param patience_s: how long to wait in all; asked again after each try.
    """
    started_s = time.monotonic()
    while (fd := lock()) is None:
        if time.monotonic() - started_s > patience_s():
            return None
        time.sleep(_POLL_S)
    return fd


def is_held(path: Path) -> bool:
    """Return whether another process holds the lock on a file, or may: it is not ours to open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        # Shared: two that only look do not take each other for a holder.
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

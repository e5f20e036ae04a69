"""The lock on a run: held by the process that runs it as long as that lives, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from hintfleet.errors import Refused

# Others hold it for a moment, to look.
_PATIENCE_S = 1.0
_POLL_S = 0.05


def try_lock(run_folder: Path) -> int | None:
    """A descriptor that holds the lock until it is closed; None if another process does."""
    run_folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(run_folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def take_lock(run_folder: Path) -> int:
    """The same, for who means to keep it: not deterred by one that only looks.

    :raises Refused: another process runs this run.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while (fd := try_lock(run_folder)) is None:
        if time.monotonic() > deadline_s:
            raise busy(run_folder.name)
        time.sleep(_POLL_S)
    return fd


def busy(run_id: str) -> Refused:
    """The error that says that a run is being run."""
    return Refused(
        f"run {run_id} is being run by another process",
        hint="wait until it has ended; `hintfleet show` says how far it is",
    )

"""The lock on a run.

The process that runs the run holds the lock until the run ends. If the process is killed, the
kernel releases the lock. So a reader that can take the lock, which it holds only for a moment,
knows that nobody runs the run.
"""

from __future__ import annotations

from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.system.file_lock import lock_file, wait_for

# How long to wait for a process that holds the lock only for a moment, because it looks for
# abandoned runs (`Store._end_abandoned_runs`) or for leaks (orchestrator/leaks.py).
_LOCK_TIMEOUT_S = 1.0


def try_lock(run_folder: Path) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None if the lock is held already.

    Creates the folder and the lock file if they do not exist.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    return lock_file(run_folder / "lock")


def take_lock(run_folder: Path) -> int:
    """Return a descriptor that holds the lock until it is closed.

    Waits up to 1 s if the lock is held: a reader holds it only for a moment.

    :raises Refused: another process runs this run.
    """
    fd = wait_for(lambda: try_lock(run_folder), lambda: _LOCK_TIMEOUT_S)
    if fd is None:
        raise busy_error(run_folder.name)
    return fd


def busy_error(run_id: str) -> Refused:
    """Return the error for a run that another process runs now."""
    return Refused(
        f"run {run_id} is being run by another process",
        hint="wait until it has ended; `hintfleet show` shows its progress",
    )

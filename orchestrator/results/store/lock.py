"""The lock on a run: held by the process that runs it as long as that lives, however it ends."""

from __future__ import annotations

from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.system.file_lock import lock_file, wait_for

# Others hold it for a moment, to look.
_PATIENCE_S = 1.0


def try_lock(run_folder: Path) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None if another process does."""
    run_folder.mkdir(parents=True, exist_ok=True)
    return lock_file(run_folder / "lock")


def take_lock(run_folder: Path) -> int:
    """Return the same, for who means to keep it: not deterred by one that only looks.

    :raises Refused: another process runs this run.
    """
    fd = wait_for(lambda: try_lock(run_folder), lambda: _PATIENCE_S)
    if fd is None:
        raise busy_error(run_folder.name)
    return fd


def busy_error(run_id: str) -> Refused:
    """The error that says that a run is being run."""
    return Refused(
        f"run {run_id} is being run by another process",
        hint="wait until it has ended; `hintfleet show` says how far it is",
    )

"""A killed run whose leaked file cannot be removed is unlocked all the same."""

import os
from pathlib import Path

from hintfleet.leaks import remove_all
from orchestrator.leaks import _in_store
from orchestrator.results.store.lock import try_lock


def test_a_file_that_cannot_be_removed_leaves_its_run_unlocked(tmp_path: Path) -> None:
    run_folder = tmp_path / "samples/killed"
    (run_folder / "reserve").mkdir(parents=True)  # a folder: unlink(2) fails
    (leak,) = remove_all(_in_store(tmp_path))
    assert leak.kept
    lock = try_lock(run_folder)
    assert lock is not None
    os.close(lock)

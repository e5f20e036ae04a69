"""Leaks of killed runs that cannot be removed, that go away while they are looked at, or that are
another user's."""

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hintfleet.leaks import remove_all
from orchestrator import leaks
from orchestrator.leaks import _folders, _huge_pages, _in_store
from orchestrator.results.store.lock import try_lock


def test_a_file_that_cannot_be_removed_leaves_its_run_unlocked(tmp_path: Path) -> None:
    run_folder = tmp_path / "samples/killed"
    (run_folder / "reserve").mkdir(parents=True)  # a folder: unlink(2) fails
    (leak,) = remove_all(_in_store(tmp_path))
    assert leak.kept
    lock = try_lock(run_folder)
    assert lock is not None
    os.close(lock)


def test_what_is_gone_meanwhile_is_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a killed run end, and remove their files, while they are listed."""
    run, gone = tmp_path / "run", tmp_path / "gone"
    (run / "host1").mkdir(parents=True)
    (run / "log").write_text("x" * 5000)
    scandir = os.scandir

    def vanishing(path: str) -> Any:
        if Path(path) == run / "host1":
            (run / "host1").rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    ((leak, _),) = _folders([gone, run])
    assert leak.where == str(run)
    assert leak.size_bytes >= (run / "log").stat().st_blocks * 512


def test_what_is_another_users_is_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples/run").mkdir(parents=True)
    (tmp_path / "samples/run/reserve").touch()
    monkeypatch.setattr(leaks, "try_lock", refused)
    assert not list(_in_store(tmp_path))
    monkeypatch.setattr(Path, "exists", refused)
    assert not list(_huge_pages())


def refused(path: Path) -> NoReturn:
    """Refuse a file, also to root."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

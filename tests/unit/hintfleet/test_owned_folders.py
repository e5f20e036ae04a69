"""Folders of which each belongs to one process: which are abandoned, even if process ids are
reused."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hintfleet.system.owned_folders import OwnedFolders


@pytest.fixture
def later() -> Iterator[int]:
    """Yield the id of a process that has just started, and runs until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def folder(base: Path, pid: int, age_s: float) -> Path:
    """Make a folder whose name says that process `pid` made it, and whose last change was `age_s`
    ago."""
    path = base / f"x-{pid}-abcdefgh"
    path.mkdir()
    at_s = path.stat().st_mtime - age_s
    os.utime(path, (at_s, at_s))
    return path


def test_a_reused_process_id_owns_no_folder(tmp_path: Path, later: int) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    old = folder(tmp_path, later, age_s=3600)
    assert folders.abandoned() == [old]
    fd = os.open(old, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert folders.abandoned() == [], "its owner has another process id here"
    os.close(fd)
    folders.make().remove()
    assert not old.exists()


def test_a_folder_that_is_not_locked_yet_is_not_removed(tmp_path: Path, later: int) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    new = folder(tmp_path, later, age_s=0)
    assert not folders.is_abandoned(new)
    folders.make().remove()
    assert new.exists()


def test_a_missing_folder_belongs_to_its_process_while_that_runs(
    tmp_path: Path, later: int
) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    assert not folders.is_abandoned(tmp_path / f"x-{later}-gone")
    assert folders.is_abandoned(tmp_path / "x-999999999-gone")
    assert not folders.is_abandoned(tmp_path / "others-999999999-gone")

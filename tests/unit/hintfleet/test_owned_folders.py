"""Folders have one process as owner, even where a process id proves little."""

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
    """Return the id of a living process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def folder(base: Path, pid: int, age_s: float) -> Path:
    """Make a folder whose last change is `age_s` old."""
    path = base / f"x-{pid}-abcdefgh"
    path.mkdir()
    at_s = path.stat().st_mtime - age_s
    os.utime(path, (at_s, at_s))
    return path


def test_a_process_id_that_was_used_again_owns_nothing(tmp_path: Path, later: int) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    old = folder(tmp_path, later, age_s=3600)
    assert folders.abandoned() == [old]
    fd = os.open(old, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert folders.abandoned() == [], "its owner has another process id here"
    os.close(fd)
    folders.make().remove()
    assert not old.exists()


def test_a_folder_whose_maker_is_about_to_lock_it_is_let_alone(tmp_path: Path, later: int) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    new = folder(tmp_path, later, age_s=0)
    assert not folders.belongs_to_nobody(new)
    folders.make().remove()
    assert new.exists()


def test_a_folder_that_is_gone_belongs_to_its_process_while_that_lives(
    tmp_path: Path, later: int
) -> None:
    folders = OwnedFolders(base=tmp_path, prefix="x-")
    assert not folders.belongs_to_nobody(tmp_path / f"x-{later}-gone")
    assert folders.belongs_to_nobody(tmp_path / "x-999999999-gone")
    assert not folders.belongs_to_nobody(tmp_path / "others-999999999-gone")

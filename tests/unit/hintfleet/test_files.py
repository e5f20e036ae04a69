"""Small files whose paths users give, and what may be in their place."""

import os
from pathlib import Path

import pytest

from hintfleet.system.files import read_at_most


def test_a_file_is_read_if_it_is_small(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_at_most(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_at_most(tmp_path / "file", 4)


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_at_most(tmp_path / "pipe", 5) == b""


def test_a_folder_is_named_and_not_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError) as caught:
        read_at_most(tmp_path, 5)
    assert caught.value.filename == str(tmp_path)
    assert os.listdir("/proc/self/fd") == before

"""Files whose paths users give: what may be in their place, and what is left after an error."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hintfleet.system.files import read_at_most, written_whole


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


@pytest.fixture(params=["nameless", "named"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave O_TMPFILE as it is here, or act like a kernel that does not know it."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # an old kernel sees no more in it


@pytest.mark.usefixtures("file_system")
def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with written_whole(tmp_path / "file") as file:
        file.write(b"new")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.usefixtures("file_system")
def test_after_an_error_the_old_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ValueError, match="x"), written_whole(tmp_path / "file") as file:  # noqa: PT012
        file.write(b"new")
        raise ValueError("x")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 1


def test_a_killed_process_leaves_nothing_but_the_old_file(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"no O_TMPFILE here: {error}")
    (tmp_path / "file").write_bytes(b"old")
    program = f"""
import os, pathlib
from hintfleet.system.files import written_whole
with written_whole(pathlib.Path({str(tmp_path / "file")!r})) as file:
    file.write(bytes(1 << 20))
    os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.usefixtures("file_system")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for content in (b"first", b"second"):
        with written_whole(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == content
        assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/null"])
def test_what_is_no_file_is_not_replaced(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = (tmp_path / name).stat()
    with pytest.raises(OSError, match="not a regular file"), written_whole(tmp_path / name):
        pass
    assert (tmp_path / name).stat().st_mode == before.st_mode

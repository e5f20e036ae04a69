"""Runtime folders are private and have short paths; those of killed processes are removed. Also the
facts about this machine that are stored with a run."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.machine import environment, runtime_dirs

_KILLED = """
import os, signal
from orchestrator.machine import runtime_dirs
made = runtime_dirs().make()
(made.path / "socket").touch()
print(made.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_folders_of_killed_processes_are_removed_and_others_stay(base: Path) -> None:
    (base / "hf-other").mkdir()
    alive = runtime_dirs().make()
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.parent == base
    assert left.is_dir()
    made = runtime_dirs().make()
    assert {path.name for path in base.iterdir()} == {"hf-other", alive.path.name, made.path.name}
    assert made.path.stat().st_mode & 0o777 == 0o700
    for folder in (alive, made, made):
        folder.remove()
    assert [path.name for path in base.iterdir()] == ["hf-other"]


def test_a_folder_in_use_stays_though_its_process_cannot_be_seen(base: Path) -> None:
    other = runtime_dirs().make()
    # As if a process of another container had made the folder: no process here has the id in the
    # folder's name.
    elsewhere = other.path.rename(base / "hf-999999999-x")
    runtime_dirs().make().remove()
    assert elsewhere.is_dir()
    other.remove()
    runtime_dirs().make().remove()
    assert not elsewhere.exists(), "its lock was released"


def test_a_long_temporary_folder_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = base / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    made = runtime_dirs().make()
    try:
        assert len(str(made.path)) < 40
    finally:
        made.remove()


@pytest.mark.parametrize("length", [19, 20, 30, 31])
def test_sockets_of_ray_fit(base: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    folder = base / ("x" * (length - len(str(base)) - 1))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    made = runtime_dirs().make()
    made.remove()
    pid = "4194303"  # the largest (PID_MAX_LIMIT, include/linux/threads.h)
    private = str(made.path).replace(f"-{os.getpid()}-", f"-{pid}-")
    session = f"session_2026-01-01_00-00-00_000000_{pid}"
    assert len(f"{private}/ray/{session}/sockets/plasma_store") <= 107


def test_the_environment_says_what_matters() -> None:
    found = environment()
    assert {"hintfleet", "kernel", "processors", "memory", "ray"} <= found.keys()
    assert all(found.values())

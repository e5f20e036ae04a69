"""Reading a file that takes no disk space fills the page cache. Errors say what is not possible."""

import shutil
import subprocess
from pathlib import Path

import pytest

from guest_agent.memory.blocks import MemoryBlocks
from guest_agent.workload.file_cache import FileCache
from guest_agent.workload.memory import AnonymousSource
from guest_agent.workload.programs import Programs
from guest_agent.workload.workload import GuestSystem, Workload
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2 as pb


def workload(cache: FileCache) -> Workload:
    system = GuestSystem(cache=cache, programs=Programs(()))
    return Workload(AnonymousSource(8 * MIB), MemoryBlocks(), system)


def read(size_bytes: int) -> pb.WorkloadCommand:
    return pb.WorkloadCommand(command_id=1, read=pb.Read(size_bytes=size_bytes))


DROP = pb.WorkloadCommand(command_id=2, drop_caches=pb.DropCaches())


def cached_bytes(path: Path) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not shutil.which("fincore"), reason="needs fincore of util-linux")
def test_the_page_cache_holds_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "cached"
    done = workload(FileCache(path)).run(read(5 * MIB))
    assert (done.error, done.changed_bytes) == ("", 0)
    assert cached_bytes(path) == 5 * MIB
    assert path.stat().st_blocks == 0, "the file is a hole"


def test_a_file_that_is_there_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    path.write_bytes(bytes(3 * MIB))
    path.chmod(0o400)
    before = path.stat()
    assert workload(FileCache(path)).run(read(2 * MIB)).error == ""
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = workload(FileCache(tmp_path / "file/cached")).run(read(MIB))
    assert done.error.endswith("file/cached: File exists")


def test_dropping_caches(tmp_path: Path) -> None:
    drop_caches = tmp_path / "drop_caches"
    assert workload(FileCache(tmp_path, drop_caches)).run(DROP).error == ""
    assert drop_caches.read_text() == "3\n"
    done = workload(FileCache(tmp_path, tmp_path)).run(DROP)
    assert "cannot write to" in done.error


def test_a_guest_without_a_page_cache_refuses() -> None:
    for command in (read(MIB), DROP):
        embedded = Workload(AnonymousSource(8 * MIB), MemoryBlocks())
        assert "an embedded guest has no page cache" in embedded.run(command).error

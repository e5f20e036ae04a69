"""Many holes are punched by the loop in C, or by the loop in Python for machines without a
compiler."""

import errno
import os
import shutil
import subprocess
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64
from functools import partial
from pathlib import Path

import pytest

from hintfleet.units import MIB, PAGE_BYTES
from host_agent.memory import punch
from host_agent.memory.fence import Fence, FenceClosed
from host_agent.memory.punch import LIBRARY, Punch, loop_in_c, loop_in_ctypes

PAGES = 16
OPEN = (c_int64(0), 0)
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture(
    params=[
        pytest.param(partial(loop_in_c, LIBRARY), marks=needs_compiler, id="c"),
        pytest.param(loop_in_ctypes, id="one-by-one"),
    ]
)
def punch_all(request: pytest.FixtureRequest) -> Punch:
    made: Punch = request.param()
    return made


@pytest.fixture
def fd() -> Iterator[int]:
    file = os.memfd_create("punched")
    os.pwrite(file, b"\1" * (PAGES * PAGE_BYTES), 0)
    yield file
    os.close(file)


def in_bytes(*pages: int) -> "array[int]":
    return array("q", [page * PAGE_BYTES for page in pages])


def pages_with_data(fd: int) -> list[int]:
    data = os.pread(fd, PAGES * PAGE_BYTES, 0)
    return [page for page in range(PAGES) if data[page * PAGE_BYTES]]


def test_only_the_ranges_are_dropped(fd: int, punch_all: Punch) -> None:
    ranges = [(1, 2), (5, 1), (8, 4)]
    offsets, lengths = zip(*ranges, strict=True)
    punch_all(fd, in_bytes(*offsets), in_bytes(*lengths), *OPEN)
    assert pages_with_data(fd) == [0, 3, 4, 6, 7, 12, 13, 14, 15]
    assert os.fstat(fd).st_size == PAGES * PAGE_BYTES
    assert os.fstat(fd).st_blocks * 512 == 9 * PAGE_BYTES


def test_nothing_to_drop(fd: int, punch_all: Punch) -> None:
    punch_all(fd, in_bytes(), in_bytes(), *OPEN)
    assert len(pages_with_data(fd)) == PAGES


def test_it_ends_at_the_first_that_is_refused(fd: int, punch_all: Punch) -> None:
    with pytest.raises(OSError, match="punching a hole") as refused:
        punch_all(fd, in_bytes(0, -1, 4), in_bytes(1, 1, 1), *OPEN)
    assert refused.value.errno == errno.EINVAL
    assert pages_with_data(fd) == list(range(1, PAGES))


def test_nothing_is_dropped_once_the_permit_has_ended(fd: int, punch_all: Punch) -> None:
    fence = Fence()
    permit = fence.permit()
    fence.close(lambda: None)
    fence.open()
    with pytest.raises(FenceClosed):
        punch_all(fd, in_bytes(0, 1), in_bytes(1, 1), fence.closed_times, permit)
    assert len(pages_with_data(fd)) == PAGES


def test_a_batch_ends_in_the_middle_when_the_fence_closes(punch_all: Punch) -> None:
    pages = 256 * MIB // PAGE_BYTES
    ranges = array("q", range(0, 256 * MIB, PAGE_BYTES)), array("q", [PAGE_BYTES] * pages)
    fd = os.memfd_create("punched")
    for _ in range(50):  # a busy machine may run this thread only after the batch is over
        for at in range(0, 256 * MIB, MIB):
            os.pwrite(fd, b"\1" * MIB, at)
        fence = Fence()
        arguments = (fd, *ranges, fence.closed_times, fence.permit())
        with ThreadPoolExecutor(1) as thread:
            batch = thread.submit(punch_all, *arguments)
            while os.fstat(fd).st_blocks * 512 == 256 * MIB:
                pass
            fence.close(lambda: None)
        left_pages = os.fstat(fd).st_blocks * 512 // PAGE_BYTES
        if batch.exception():
            break
    os.close(fd)
    assert isinstance(batch.exception(), FenceClosed)
    assert 0 < left_pages < pages


@needs_compiler
def test_a_library_of_an_older_source(tmp_path: Path) -> None:
    source = tmp_path / "old.c"
    source.write_text("int punch_all(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-o", tmp_path / "old.so", source], check=True)
    with pytest.raises(OSError, match=r"old\.so was built from an older punch\.c"):
        loop_in_c(tmp_path / "old.so")


@needs_compiler
def test_the_host_agent_has_the_loop_in_c() -> None:
    assert punch.punch.__qualname__.startswith("loop_in_c.")


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot open shared object"):
        loop_in_c(tmp_path / "libpunch.so")

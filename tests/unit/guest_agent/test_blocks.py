"""Memory blocks of a guest's kernel, on a fake tree of /sys (tests/vm uses real guests)."""

import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from guest_agent.memory.blocks import MemoryBlocks
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB

BLOCK_PAGES = 32768
TWO_BLOCKS = RangeSet([(32 * BLOCK_PAGES, 2 * BLOCK_PAGES)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "block_size_bytes").write_text("8000000\n")
    return tmp_path


def add(root: Path, number: int, state: str = "offline") -> Path:
    unseen, block = root / "unseen", root / f"memory{number}"
    unseen.mkdir()
    (unseen / "state").write_text(f"{state}\n")
    unseen.rename(block)  # the block appears with its state, as in a kernel
    return block / "state"


def test_online_waits_for_blocks_that_appear_later(root: Path) -> None:
    first = add(root, 32)
    coming = threading.Timer(0.3, add, (root, 33))
    coming.start()
    MemoryBlocks(root).online(TWO_BLOCKS)
    coming.join()
    assert first.read_text() == (root / "memory33/state").read_text() == "online_movable\n"


def test_blocks_in_the_wanted_state_are_not_changed(root: Path) -> None:
    state = add(root, 32, "online")
    MemoryBlocks(root).online(RangeSet([(32 * BLOCK_PAGES, BLOCK_PAGES)]))
    assert state.read_text() == "online\n"


def test_blocks_that_the_kernel_onlines_at_the_same_time_are_online(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memhp_default_state: a block is there for a moment before the kernel onlines it."""
    states = [add(root, 32), add(root, 33)]

    def written_too_late(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        Path(command[3]).write_text("online\n")
        return subprocess.CompletedProcess(command, 1)  # EINVAL

    monkeypatch.setattr(subprocess, "run", written_too_late)
    MemoryBlocks(root, timeout_s=0.5).online(TWO_BLOCKS)
    assert [state.read_text() for state in states] == ["online\n"] * 2


def test_all_blocks_go_offline_or_none(root: Path) -> None:
    other, held = add(root, 32, "online"), add(root, 33, "online")
    held.unlink()
    held.symlink_to("/proc/version")  # not writable, not even for root
    with pytest.raises(Refused, match=r"memory33 stays .* in use"):
        MemoryBlocks(root, timeout_s=0.5).offline(TWO_BLOCKS)
    assert other.read_text() == "online_movable\n"
    held.unlink()
    held.write_text("online\n")
    MemoryBlocks(root).offline(TWO_BLOCKS)
    assert held.read_text() == other.read_text() == "offline\n"


@pytest.mark.parametrize("state", ["offline", "online"])
def test_a_block_that_is_unplugged_meanwhile_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Not an error of this program: it would end the guest's workload."""
    other, going = add(root, 32, state), add(root, 33, state)

    def written(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        if Path(command[3]) == going:
            shutil.rmtree(going.parent, ignore_errors=True)
            return subprocess.CompletedProcess(command, 2)  # ENOENT
        Path(command[3]).write_text(f"{command[4]}\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", written)
    blocks = MemoryBlocks(root)
    change = blocks.online if state == "offline" else blocks.offline
    with pytest.raises(Refused, match=r"memory block memory33 is gone$"):
        change(TWO_BLOCKS)
    assert other.read_text().startswith(state)


def test_offline_is_refused_if_the_guest_would_run_out_of_memory(root: Path) -> None:
    states = [add(root, 32, "online"), add(root, 33, "online")]
    blocks = MemoryBlocks(root, timeout_s=0.5, available_bytes=lambda: 260 * MIB)
    with pytest.raises(Refused, match="in use: the guest has only 260 MiB available"):
        blocks.offline(TWO_BLOCKS)
    assert [state.read_text() for state in states] == ["online\n"] * 2
    spare = iter([10 * MIB, 260 * MIB, 300 * MIB])
    blocks = MemoryBlocks(root, available_bytes=lambda: next(spare))
    blocks.offline(TWO_BLOCKS)
    assert [state.read_text() for state in states] == ["offline\n"] * 2


def test_a_block_that_never_appears_is_named(root: Path) -> None:
    with pytest.raises(Refused, match="no memory block memory32"):
        MemoryBlocks(root, timeout_s=0.2).online(TWO_BLOCKS)


def test_parts_of_blocks_are_refused(root: Path) -> None:
    with pytest.raises(Refused, match="134217728 bytes"):
        MemoryBlocks(root).online(RangeSet([(0, 512)]))


def test_a_kernel_without_memory_hotplug(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no memory hotplug"):
        MemoryBlocks(tmp_path).online(TWO_BLOCKS)

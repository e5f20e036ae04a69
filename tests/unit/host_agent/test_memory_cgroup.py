"""A memory cgroup keeps processes within its limit, and what a killed host agent left is found and
removed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pytest

from hintfleet.errors import Refused
from hintfleet.leaks import Leak
from hintfleet.settings import Driver
from hintfleet.system.cgroups import Hierarchy, hierarchies
from hintfleet.units import MIB
from host_agent import leaks
from host_agent.budget import memory_cgroup
from host_agent.budget.budget import Budget
from host_agent.budget.memory_cgroup import MemoryCgroup, abandoned
from tests.support.agents import wait_until

LIMIT_BYTES = 64 * MIB
USE_MEMORY = """
import mmap, os, sys, time
sys.stdin.readline()
fd = os.memfd_create("test")
os.truncate(fd, 256 << 20)
ram = mmap.mmap(fd, 256 << 20)
for i in range(int(sys.argv[1])):
    ram[i << 20 : (i + 1) << 20] = bytes([1]) * (1 << 20)
print("used", flush=True)
time.sleep(60)
"""
MAKE_AND_WAIT = f"""
import sys, time
from hintfleet.leaks import Leak
from hintfleet.settings import Driver
from host_agent.budget.memory_cgroup import MemoryCgroup
made = MemoryCgroup.make({LIMIT_BYTES}, Driver(sys.argv[1]))
print(made.folder, flush=True)
time.sleep(60)
"""


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    made = make(Driver.EMBEDDED)
    yield made
    made.remove()


def make(driver: Driver) -> MemoryCgroup:
    try:
        return MemoryCgroup.make(LIMIT_BYTES, driver)
    except Refused as error:
        pytest.skip(f"no cgroup can be made here: {error.message}")


@contextmanager
def using(cgroup: MemoryCgroup, mib: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a process in the cgroup that writes `mib` MiB of a memfd, and then sleeps."""
    process = subprocess.Popen(
        [sys.executable, "-c", USE_MEMORY, str(mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cgroup.add(process.pid)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_does_not_fit_is_killed_and_counted(cgroup: MemoryCgroup) -> None:
    with using(cgroup, 32) as fits:
        assert fits.stdout is not None
        assert fits.stdout.readline() == "used\n"
        assert 32 * MIB <= cgroup.used_bytes < LIMIT_BYTES
        assert cgroup.oom_count == 0
        with using(cgroup, 48) as too_much:
            both = (fits, too_much)
            wait_until(lambda: any(p.poll() == -signal.SIGKILL for p in both), "a kill")
            wait_until(lambda: cgroup.oom_count > 0, "its count")
    assert cgroup.used_bytes < 32 * MIB


def test_it_goes_with_its_owner(cgroup: MemoryCgroup) -> None:
    assert cgroup.folder not in set(abandoned()), "its owner runs"
    cgroup.remove()
    assert not cgroup.folder.exists()
    cgroup.remove()


@pytest.mark.parametrize("driver", list(Driver))
def test_what_a_killed_host_agent_left_is_found_and_removed(driver: Driver) -> None:
    make(driver).remove()
    owner = subprocess.Popen(
        [sys.executable, "-c", MAKE_AND_WAIT, driver], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    owner.kill()
    owner.communicate()
    mine = [path for path in abandoned() if path.name == folder.name]
    assert folder in mine
    assert (len(mine) > 1) == (driver is Driver.LIBVIRT and len(list(hierarchies())) > 1)
    found = [removable for removable in leaks.find("test:///default")[0] if is_of(removable, mine)]
    assert len(found) == len(mine)
    for path in mine:
        (path / "qemu-1-guest.libvirt-qemu").mkdir()  # as of a domain
    for leak, remove in found:
        assert leak.what == "cgroup"
        remove()
    assert not any(path.exists() for path in mine)


def test_the_next_one_removes_what_a_killed_host_agent_left() -> None:
    make(Driver.EMBEDDED).remove()
    owner = subprocess.Popen(
        [sys.executable, "-c", MAKE_AND_WAIT, Driver.EMBEDDED], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    other = make(Driver.EMBEDDED)
    assert folder.exists(), "its owner runs"
    other.remove()
    owner.kill()
    owner.communicate()
    (folder / "below").mkdir()
    make(Driver.EMBEDDED).remove()
    assert not folder.exists()


def is_of(removable: tuple[Leak, object], paths: list[Path]) -> bool:
    return removable[0].where in map(str, paths)


def test_a_partition_is_in_every_hierarchy() -> None:
    made = make(Driver.LIBVIRT)
    try:
        assert made.partition == f"/{made.folder.name.removesuffix('.partition')}"
        for hierarchy in hierarchies():
            assert (Path(hierarchy.top) / made.folder.name).is_dir()
    finally:
        made.remove()
    for hierarchy in hierarchies():
        assert not (Path(hierarchy.top) / made.folder.name).exists()


def test_where_systemd_manages_cgroups_the_budget_is_watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_cgroup, "_SYSTEMD", tmp_path)
    budget = Budget.enforced(LIMIT_BYTES, Driver.EMBEDDED)
    assert budget.cgroup is None
    assert "systemd" in budget.message().why_watched
    use = budget.use([10, 20])
    assert (use.used_bytes, use.limit_bytes, use.enforced) == (30, LIMIT_BYTES, False)
    budget.contain(os.getpid())  # without a cgroup, this does nothing
    budget.close()


def test_a_folder_that_cannot_be_made_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = PurePosixPath(tmp_path)
    found = [Hierarchy(controllers=frozenset({"memory"}), top=place, own=place)]
    monkeypatch.setattr(memory_cgroup, "hierarchies", lambda: iter(found))
    with pytest.raises(Refused, match=r"memory\.limit_in_bytes: No such file"):
        MemoryCgroup.make(LIMIT_BYTES, Driver.EMBEDDED)
    assert not list(tmp_path.glob("hintfleet-*")), "nothing is left"

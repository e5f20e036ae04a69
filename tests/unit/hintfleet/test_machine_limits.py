"""Limits of cgroups on machines and in containers, with files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from hintfleet.errors import Refused
from hintfleet.system.machine_limits import Bound, available_memory, processors, total_memory
from hintfleet.units import GIB, MIB

NO_LIMIT = 9223372036854771712
""""No limit" in cgroups v1: the largest multiple of the page size in a signed number of 64 bits."""


class Machine:
    """A root folder with the files of a machine of 8 GiB, of which half are available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {8 * MIB} kB\nMemAvailable: {4 * MIB} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, cgroup: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "".join(f"{mount}\n" for mount in mounts))

    def v1(self, folder: str, limit: int, usage: int = 0, *, least: int = NO_LIMIT) -> None:
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(
            f"{folder}/memory.stat",
            "inactive_file 1\nactive_file 1\nshmem 1\n"
            f"hierarchical_memory_limit {least}\n"
            f"total_shmem {100 * MIB}\n"
            f"total_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}\n",
        )

    def v2(self, folder: str, limit: str, usage: int = 0, high: str = "max") -> None:
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file {30 * MIB}\nactive_file {20 * MIB}\n")


V1 = "/sys/fs/cgroup/memory"
V1_MOUNT = f"35 31 0:32 / {V1} rw,relatime - cgroup cgroup rw,memory"
V1_CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "/sys/fs/cgroup"
V2_MOUNT = f"31 23 0:26 / {V2} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_cgroups_the_machine_is_the_limit(machine: Machine) -> None:
    assert total_memory(machine.root) == Bound(value=8 * GIB)
    assert available_memory(machine.root) == Bound(value=4 * GIB)
    assert processors(machine.root) == Bound(value=len(os.sched_getaffinity(0)))
    machine.process("4:memory:/\n0::/\n", V1_MOUNT)
    machine.v1(V1, NO_LIMIT, 3 * GIB)
    assert total_memory(machine.root) == Bound(value=8 * GIB)
    assert available_memory(machine.root) == Bound(value=4 * GIB)


def test_v1_counts_memory_that_cannot_be_reclaimed(machine: Machine) -> None:
    machine.process("5:cpu:/\n4:memory:/a\n", V1_MOUNT)
    machine.v1(V1, NO_LIMIT)
    machine.v1(f"{V1}/a", 600 * MIB, 200 * MIB)
    assert total_memory(machine.root) == Bound(value=600 * MIB, cgroup=f"{V1}/a")
    # Counted as available: all of the inactive page cache, half of the active, nothing of a memfd.
    left = (600 - 200 + 30 + 10) * MIB
    assert available_memory(machine.root) == Bound(value=left, cgroup=f"{V1}/a")


def test_the_lowest_limit_above_counts(machine: Machine) -> None:
    machine.process("0::/a/b/c\n", V2_MOUNT)
    machine.v2(f"{V2}/a", str(2 * GIB), usage=1900 * MIB)
    machine.v2(f"{V2}/a/b", str(GIB), usage=100 * MIB)
    machine.v2(f"{V2}/a/b/c", "max", usage=90 * MIB)
    assert total_memory(machine.root) == Bound(value=GIB, cgroup=f"{V2}/a/b")
    left = (2048 - 1900 + 40) * MIB
    assert available_memory(machine.root) == Bound(value=left, cgroup=f"{V2}/a")


def test_memory_high_is_a_limit(machine: Machine) -> None:
    machine.process("0::/a\n", V2_MOUNT)
    machine.v2(f"{V2}/a", str(2 * GIB), high=str(GIB))
    assert total_memory(machine.root) == Bound(value=GIB, cgroup=f"{V2}/a")


def test_a_cgroup_that_is_full_has_nothing(machine: Machine) -> None:
    machine.process("0::/a\n", V2_MOUNT)
    machine.v2(f"{V2}/a", str(100 * MIB), usage=200 * MIB)
    assert available_memory(machine.root).value == 0


@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/", "/"),  # process in a cgroup namespace, mount made in it
        ("/docker/3f", "/docker/3f"),  # no cgroup namespace: both are the host's path
        ("/docker/3f/x", "/docker/3f"),  # no cgroup namespace, process below the mount's cgroup
        ("/", "/.."),  # process in a cgroup namespace, mount made outside of it
        ("/kubepods/elsewhere", "/docker/3f"),  # the process was moved to another cgroup
        ("/only/on/the/host", "/"),  # the mount does not show its real root
    ],
)
def test_containers(machine: Machine, path: str, top: str) -> None:
    mount = V2_MOUNT.replace(f" / {V2} ", f" {top} {V2} ")
    machine.process(f"0::{path}\n", mount)
    machine.v2(V2, str(600 * MIB), usage=200 * MIB)
    assert total_memory(machine.root) == Bound(value=600 * MIB, cgroup=V2)
    assert available_memory(machine.root) == Bound(value=440 * MIB, cgroup=V2)


def test_v1_reports_limits_that_a_container_cannot_see(machine: Machine) -> None:
    machine.process("4:memory:/pod/c\n", V1_MOUNT.replace(" / ", " /pod/c ", 1))
    machine.v1(V1, NO_LIMIT, least=700 * MIB)
    assert total_memory(machine.root) == Bound(value=700 * MIB, cgroup=V1)


def test_another_containers_cgroup_is_not_ours(machine: Machine) -> None:
    other = V1_MOUNT.replace(f" / {V1} ", " /other /mnt/with\\040blank ")
    machine.process("4:memory:/a\n", other, V1_MOUNT)
    machine.v1("/mnt/with blank", MIB)
    machine.v1(f"{V1}/a", GIB)
    assert total_memory(machine.root) == Bound(value=GIB, cgroup=f"{V1}/a")
    machine.process("4:memory:/other\n", other)
    assert total_memory(machine.root) == Bound(value=MIB, cgroup="/mnt/with blank")


def test_processors(machine: Machine) -> None:
    machine.process("3:cpu,cpuacct:/a/b\n0::/x\n", V1_CPU_MOUNT, V2_MOUNT)
    v1 = "/sys/fs/cgroup/cpu,cpuacct/a"
    for folder, quota in ((v1, 25_000), (f"{v1}/b", -1)):
        machine.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
        machine.write(f"{folder}/cpu.cfs_period_us", "50000\n")
    assert processors(machine.root) == Bound(value=0.5, cgroup=v1)
    machine.write(f"{V2}/x/cpu.max", "20000 100000\n")
    assert processors(machine.root) == Bound(value=0.2, cgroup=f"{V2}/x")
    machine.write(f"{V2}/x/cpu.max", "max 100000\n")
    assert processors(machine.root) == Bound(value=0.5, cgroup=v1)


def test_a_kernel_without_the_field_is_refused(machine: Machine) -> None:
    machine.write("proc/meminfo", f"MemTotal: {MIB} kB\n")
    with pytest.raises(Refused, match="has no MemAvailable"):
        available_memory(machine.root)

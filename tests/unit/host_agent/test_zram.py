"""Guests can be swapped out to zram, which counts into the budget; no device is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hintfleet.errors import Refused
from hintfleet.settings import Driver
from hintfleet.units import MIB
from host_agent import leaks
from host_agent.budget.budget import Budget
from host_agent.budget.zram import Zram, abandoned
from tests.support.agents import wait_until
from tests.support.lab import on_this_machine

BUDGET_BYTES = 64 * MIB
# Writes as many MiB as it is told to; half of each page is zeros.
USE_MEMORY = """
import os, sys
sys.stdin.readline()
fd = os.memfd_create("test")
os.truncate(fd, 512 << 20)
for i in range(int(sys.argv[1])):
    os.pwrite(fd, b"".join(os.urandom(2048) + bytes(2048) for _ in range(256)), i << 20)
print("used", flush=True)
sys.stdin.read()
"""
MAKE_AND_WAIT = """
import sys
from host_agent.budget.zram import Zram
made = Zram.make(16 << 20)
print(made._device, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with on_this_machine(), on_this_machine("swap", alone=True):
        yield


@pytest.fixture
def budget(alone: None) -> Iterator[Budget]:
    made = Budget.enforced(BUDGET_BYTES, Driver.EMBEDDED)
    try:
        made.use_swap(256 * MIB)
    except Refused as error:
        made.close()
        pytest.skip(f"no zram here: {error.message}")
    yield made
    made.close()


def using(budget: Budget, mib: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", USE_MEMORY, str(mib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    budget.contain(process.pid)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def swaps() -> list[str]:
    return [line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]]


def test_more_fits_when_it_is_compressed_and_that_counts(budget: Budget) -> None:
    assert budget.swap is not None
    with using(budget, 96) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "used\n"
            swap = budget.swap
            # At least 96 MiB - 64 MiB are swapped out, and take about half of that.
            wait_until(lambda: swap.used_bytes > 12 * MIB, "pages to be swapped out")
            wait_until(
                lambda: budget.use([]).used_bytes <= BUDGET_BYTES + MIB, "both to fit the budget"
            )
            assert budget.use([]).oom_count == 0
        finally:
            process.kill()
    zram = budget.swap._zram
    assert zram is not None
    device = zram._device
    budget.use_swap(0)
    assert str(device) not in swaps()
    assert not Path("/sys/block", device.name).exists()
    with using(budget, 96) as process:
        try:
            wait_until(lambda: process.poll() == -signal.SIGKILL, "the end of what does not fit")
        finally:
            process.kill()


def test_memory_that_cannot_be_compressed_enough_runs_out(budget: Budget) -> None:
    with using(budget, 200) as process:
        try:
            wait_until(lambda: budget.use([]).oom_count > 0, "the end of the budget")
        finally:
            process.kill()
    before = budget.use([]).oom_count
    budget.use_swap(0)
    assert budget.use([]).oom_count >= before, "else the next trial's would not be noticed"


@pytest.mark.usefixtures("budget")
def test_what_a_killed_host_agent_left_is_removed() -> None:
    command = [sys.executable, "-c", MAKE_AND_WAIT]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        device = Path(process.stdout.readline().strip())
        assert str(device) in swaps()
        assert device not in set(abandoned()), "its owner runs"
        process.kill()
    assert device in set(abandoned())
    found, _ = leaks.find("")
    ((leak, remove),) = [(leak, act) for leak, act in found if leak.where == str(device)]
    assert leak.what == "zram swap"
    remove()
    assert str(device) not in swaps()
    assert not device.exists()


@pytest.mark.parametrize("size_bytes", [4095, MIB - 1, 1 << 50])
def test_a_device_of_an_impossible_size_is_refused(size_bytes: int) -> None:
    before = sorted(Path("/sys/block").glob("zram*"))
    with pytest.raises(Refused, match="must be 1 MiB to 1 TiB"):
        Zram.make(size_bytes)
    assert sorted(Path("/sys/block").glob("zram*")) == before


def test_guests_are_swapped_to_zram_before_other_swap(budget: Budget) -> None:
    assert budget.swap_bytes == 256 * MIB
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    priorities = {line.split()[0]: int(line.split()[4]) for line in lines}
    ours = [value for name, value in priorities.items() if name.startswith("/dev/zram")]
    assert max(ours) == 0x7FFF == max(priorities.values())


def test_without_a_cgroup_there_is_no_zram() -> None:
    budget = Budget(limit_bytes=BUDGET_BYTES, why_watched="systemd manages the cgroups")
    with pytest.raises(Refused) as refused:
        budget.use_swap(MIB)
    assert "systemd manages" in refused.value.hint
    budget.use_swap(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may make devices")
def test_an_ordinary_user_is_told_why() -> None:
    with pytest.raises(Refused):
        Zram.make(MIB)

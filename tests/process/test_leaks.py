"""`doctor --leaks` lists what a crash left behind, `doctor --clean` removes it, and neither touches
what has an owner."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hintfleet.units import MIB
from orchestrator.results.store.lock import try_lock
from tests.support.agents import (
    HANG_S,
    HostAgent,
    alive,
    child_pids,
    running_host_agent,
    wait_until,
)
from tests.support.lab import Lab


@pytest.fixture
def dead_pid() -> int:
    """Return the id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def doctor(lab: Lab, flag: str, code: int) -> dict[str, dict[str, Any]]:
    """Run `doctor` with a flag; return the leaks that it lists, by `where` up to its colon."""
    done = lab.run("doctor", flag, "-o", "json")
    found = json.loads(done.stdout)["leaks"]
    # Exit code 1, "there are leaks", is always accepted: other programs on this machine may have
    # left some.
    assert done.returncode in (code, 1), done.stderr
    return {leak["where"].partition(":")[0]: leak for leak in found}


def hang(host: HostAgent) -> list[int]:
    """Suspend a host agent and its guest, then close its lifeline: neither can notice that. Return
    the ids of both processes."""
    pids = [host.process.pid, *child_pids(host.process.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    host.cut_lifeline()
    return pids


def left_behind(lab: Lab, dead_pid: int) -> list[Path]:
    """Make files such as killed processes leave; return those that `--clean` must remove."""
    runtime = lab.temporary / f"hf-{dead_pid}-abcdefgh"
    (runtime / "host1.1").mkdir(parents=True)
    guest = lab.temporary / f"hintfleet-guest-{dead_pid}-abcdefgh"
    guest.mkdir()
    (guest / "console.log").write_text("Linux\n")
    trial = lab.folder / "hintfleet/samples/killed/killed-none-1"
    trial.mkdir(parents=True)
    (trial / "000001.parquet").write_bytes(b"whole")
    (trial / "000002.unfinished").write_bytes(bytes(8192))
    (trial.parent / "reserve").write_bytes(bytes(MIB))
    return [runtime, guest, trial / "000002.unfinished", trial.parent / "reserve"]


@contextlib.contextmanager
def held(lab: Lab, dead_pid: int) -> Iterator[list[Path]]:
    """Make files that `--clean` must not remove, and yield their paths. They belong to a living
    process, are locked, or are not hintfleet's."""
    mine = lab.temporary / f"hf-{os.getpid()}-abcdefgh"
    # The process in their names is dead here, but they are locked: so their owner may live in
    # another container.
    locked = [lab.temporary / f"{kind}-{dead_pid}-held" for kind in ("hf", "hintfleet-guest")]
    elsewhere = lab.temporary / f"hf-{dead_pid}-not"
    elsewhere.write_text("a file, no folder of ours")
    run = lab.folder / "hintfleet/samples/running"
    run.mkdir(parents=True)
    (run / "reserve").write_bytes(bytes(MIB))
    run_lock = try_lock(run)
    assert run_lock is not None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, run_lock)
        for path in (mine, *locked):
            path.mkdir()
        for path in locked:
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield [mine, *locked, elsewhere, run / "reserve"]


def test_only_what_has_no_owner_is_removed(cleaning_lab: Lab, dead_pid: int) -> None:
    lab = cleaning_lab
    files = left_behind(lab, dead_pid)
    with (
        held(lab, dead_pid) as others,
        running_host_agent() as living,
        running_host_agent() as hanging,
        running_host_agent("--state", f"{lab.folder}/state") as surviving,
    ):
        for host in (living, hanging, surviving):
            host.watch()
            host.create()
            host.allocate(32 * MIB)
        lost = hang(hanging)
        survivors = child_pids(surviving.process.pid)
        surviving.process.kill()
        surviving.process.wait(HANG_S)
        spared = [living.process.pid, *child_pids(living.process.pid), *survivors]
        assert len(survivors) == 1

        found = doctor(lab, "--leaks", 1)
        ours = {*map(str, files), *(f"process {pid}" for pid in lost)}
        assert ours <= found.keys()
        assert not {str(path) for path in others} & found.keys()
        assert not {f"process {pid}" for pid in spared} & found.keys()
        kinds = [found[f"process {pid}"]["what"] for pid in lost]
        assert kinds == ["host agent", "embedded guest"]
        memory_bytes = sum(found[f"process {pid}"]["size_bytes"] for pid in lost)
        assert 32 * MIB <= memory_bytes < 128 * MIB, "one RAM file, counted once"
        assert found[str(files[-1])]["size_bytes"] == MIB
        assert all(leak["since_unix_s"] > 0 for leak in found.values())
        assert not any(leak["removed"] for leak in found.values())

        cleaned = doctor(lab, "--clean", 0)
        assert ours <= cleaned.keys()
        assert all(cleaned[where]["removed"] for where in ours)
        wait_until(lambda: not any(map(alive, lost)), "the end of the suspended processes")
        assert not any(path.exists() for path in files)
        assert all(path.exists() for path in others)
        assert (files[2].parent / "000001.parquet").exists()
        assert all(map(alive, spared))
        assert living.verify().wrong_pages == 0
        hanging.process.wait(HANG_S)
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
    said = lab.run("doctor", "--leaks")
    assert said.returncode == 1
    assert "unfinished file" in said.stdout, "the lock's holder is gone now"
    assert "hintfleet doctor --clean" in said.stderr


_UNSHARE = ("unshare", "--user", "--map-root-user", "--fork", "--kill-child")


@pytest.mark.parametrize(
    ("within", "listed"),
    [((), True), ((*_UNSHARE, "--mount"), False), ((*_UNSHARE, "--pid"), False)],
)
def test_processes_of_a_container_are_not_ours_to_end(
    lab: Lab, dead_pid: int, within: tuple[str, ...], listed: bool
) -> None:
    """A path or process id inside a container may look like one here, but is not the same."""
    if within and subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("this machine makes no namespaces")
    folder = f"{lab.temporary}/hf-{dead_pid}-abcdefgh/ray/session"
    command = [*within, "bash", "-c", "echo; read", "/ray/core/src/ray/raylet/raylet", folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (pid,) = child_pids(process.pid) if within else [process.pid]
        assert (f"process {pid}" in doctor(lab, "--leaks", 0)) == listed

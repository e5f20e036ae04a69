"""Runs `hintfleet` as a user does, and finds processes and temporary files that it leaves behind.
Also a lock, with which a test that acts on the whole machine runs alone."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.agents import HANG_S, wait_until

RUN_TIMEOUT_S = 1800
_MARK = "HINTFLEET_TEST_MARK"


def processes_with(variable: str, value: str) -> dict[int, str]:
    """Return the ids and command lines of all processes with `variable`=`value` in their
    environment."""
    found = {}
    wanted = f"{variable}={value}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (
                    (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
                )
        except OSError:
            continue
    return found


@dataclass(kw_only=True)
class Lab:
    """A folder for specs and results, and the commands that use it.

    Each command gets the mark in its environment, and its child processes inherit that.

    :ivar temporary: TMPDIR of the commands.
    :ivar prefix: words to put before each command, such as `ip netns exec NAME`.
    """

    folder: Path
    temporary: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    prefix: tuple[str, ...] = ()

    def command(self, *arguments: str) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "orchestrator", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            _MARK: self.mark,
            "XDG_DATA_HOME": str(self.folder),
            "TMPDIR": str(self.temporary),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def spec(self, text: str) -> str:
        """Write a spec file, in place of an earlier one, and return its path."""
        path = self.folder / "spec.yaml"
        path.write_text(text)
        return str(path)

    def processes(self) -> dict[int, str]:
        """Return the ids and command lines of all processes that have the mark."""
        return processes_with(_MARK, self.mark)

    def agents(self, *modules: str) -> list[int]:
        """Return the ids of those of `processes` that run these Python modules."""
        return [pid for module in modules for pid in self.find(f"-m {module}")]

    def find(self, part: str) -> list[int]:
        """Return the ids of those of `processes` with `part` in their command line."""
        return [pid for pid, command in self.processes().items() if part in command]

    def check_nothing_is_left(self, timeout_s: float = HANG_S) -> None:
        wait_until(lambda: not self.processes(), f"the end of {self.processes()}", timeout_s)
        left = [str(path) for path in self.temporary.rglob("*")]
        bugs = [path.read_text() for path in self.temporary.glob("hintfleet-bug-*")]
        assert not left, "\n".join((f"left behind: {left}", *bugs))


def wait_for_line(process: "subprocess.Popen[str]", start: str) -> str:
    """Wait for the next line on stderr that begins with `start`, and return it.

    :raises AssertionError: stderr ended without such a line.
    """
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        if line.startswith(start):
            return line
        said.append(line)
    raise AssertionError(f"the command ended without a line {start!r}: {''.join(said)}")


def parent_pid(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("PPid:"))


@contextmanager
def on_this_machine(what: str = "tests", *, alone: bool = False) -> Iterator[None]:
    """Hold a lock of this user's tests on this machine until the block ends.

    :param what: the name of the lock. Each test that needs swap holds "swap" alone, because the
        kernel moves pages of any process to any swap device.
    :param alone: let no other test hold the lock meanwhile; else others may hold it, too. A test of
        `doctor --clean` holds "tests" alone: the command would remove what other tests need.
    """
    # The lock file is not in this source tree: tests of another clone may run on this machine.
    lock = os.open(f"/tmp/hintfleet-{what}-{os.geteuid()}.lock", os.O_RDWR | os.O_CREAT, 0o600)  # noqa: S108
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


@contextmanager
def made_lab(folder: Path) -> Iterator[Lab]:
    # `temporary` is not below `folder`: it is for unix sockets, too, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="hft-") as temporary:
        made = Lab(folder=folder, temporary=Path(temporary))
        try:
            yield made
        finally:
            for pid in made.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not made.processes(), "the end of killed processes")


def result(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found

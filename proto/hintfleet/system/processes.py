"""Finds processes of this machine in /proc (proc(5)), and can end them.

A `Process` is identified by its pid and its start time, so `end` never ends a later process that
has the same pid.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused

_TERM_TIMEOUT_S = 3.0
_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that was running when it was found.

    :ivar session: pid of the leader of its session.
    :ivar start_ticks: when it started, in clock ticks since boot.
    """

    pid: int
    parent_pid: int
    session: int
    start_ticks: int
    argv: tuple[str, ...]

    @property
    def started_unix_s(self) -> int:
        """When the process started, rounded to whole seconds."""
        since_boot_s = self.start_ticks / os.sysconf("SC_CLK_TCK")
        return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s)

    def descriptor_targets(self) -> dict[int, str] | None:
        """Return for each open descriptor the target of its link in /proc/PID/fd.

        None if we may not list them, or if the process is gone.
        """
        folder = f"/proc/{self.pid}/fd"
        try:
            numbers = [int(name) for name in os.listdir(folder)]
        except OSError:
            return None
        found = {}
        for number in numbers:
            with suppress(OSError):
                found[number] = os.readlink(f"{folder}/{number}")
        return found

    def can_write(self, fd: int) -> bool:
        """Return whether descriptor `fd` of the process was opened for writing.

        False also if that cannot be read.
        """
        try:
            info = Path(f"/proc/{self.pid}/fdinfo/{fd}").read_text()
        except OSError:
            return False
        flags = next(line for line in info.splitlines() if line.startswith("flags:"))
        return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY

    def end(self) -> None:
        """End the process by SIGTERM, and by SIGKILL if it still runs 3 s later. Blocks.

        Does nothing if the process is gone already.

        :raises Refused: the process is another user's, or still runs 5 s after SIGKILL.
        """
        # A pidfd refers to one process for ever (pidfd_open(2)): a signal that is sent through it
        # cannot reach a later process with the same pid.
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            for number, timeout_s in (
                (signal.SIGTERM, _TERM_TIMEOUT_S),
                (signal.SIGKILL, _KILL_TIMEOUT_S),
            ):
                # The process may have ended, and its pid been reused, before pidfd_open.
                now = find_process(self.pid)
                if now is None or now.start_ticks != self.start_ticks:
                    return
                if _ends(pidfd, number, timeout_s):
                    return
        except PermissionError as error:
            raise Refused(f"process {self.pid} is another user's") from error
        finally:
            os.close(pidfd)
        raise Refused(f"process {self.pid} does not end, not even by SIGKILL")


def _ends(pidfd: int, number: signal.Signals, timeout_s: float) -> bool:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
        # A stopped process cannot act on SIGTERM before it continues.
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    # A pidfd becomes readable when its process ends.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def find_process(pid: int) -> Process | None:
    """Return the running process with this pid; None if there is none, or if it is a zombie.

    :raises OSError: /proc does not let us read it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        argv = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2, the name in brackets, may contain spaces and brackets: split after the last bracket.
    # The first of `fields` is field 3 of proc(5), the state.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":  # a zombie, or dead: nothing is left to end
        return None
    return Process(
        pid=pid,
        parent_pid=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        argv=tuple(argv.decode(errors="replace").rstrip("\0").split("\0")),
    )


def other_processes() -> Iterator[Process]:
    """Yield all running processes that /proc lets us read, except this one."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            # With hidepid=1, other users' processes are listed, but cannot be read (proc(5)).
            with suppress(PermissionError):
                if found := find_process(int(name)):
                    yield found

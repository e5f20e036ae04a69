"""Programs of a real guest that the workload may start, if the agent's configuration allows it."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Sequence

from hintfleet.errors import Refused
from hintfleet.system.processes import other_processes

_POLL_S = 0.1
_KILL_ROUNDS = 20
_TITLE_LENGTH = 100
_OUTPUT_BYTES = 600
"""How much of the end of a failed program's output is told. With the title, that is less than the
host allows for an error (session/validation.py)."""


class Programs:
    """Starts programs, one at a time."""

    def __init__(self, allowed: Collection[str]) -> None:
        """:param allowed: the programs that may run, as first arguments of commands name them."""
        self._allowed = allowed

    def run(self, arguments: Sequence[str], timeout_s: float, stop: threading.Event) -> None:
        """Run a command to its end; then kill what is left of its session.

        :param stop: when it is set, the program is killed as if its time were over.
        :raises Refused: it is not allowed, or cannot be started; or it did not end in time or
            failed, then the message has the end of its output.
        """
        title = shlex.join(arguments)[:_TITLE_LENGTH]
        if not arguments or arguments[0] not in self._allowed:
            raise Refused(f"{title or 'nothing'}: the agent's configuration does not allow it")
        deadline_s = time.monotonic() + timeout_s
        output_fd, write_fd = os.pipe()
        with open(output_fd, "rb", buffering=0):
            process = _start(arguments, write_fd, title)
            output = _output(process, output_fd, deadline_s, stop)
            ended = _ended(process, 0.0 if stop.is_set() else deadline_s)
        if not ended:
            raise Refused(f"{title}: did not end within {timeout_s:g} s{output}")
        if process.returncode:
            raise Refused(f"{title}: {_status(process.returncode)}{output}")


def _start(arguments: Sequence[str], write_fd: int, title: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=write_fd,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be killed with it
        )
    except (OSError, ValueError) as error:
        raise Refused(f"{title}: cannot be started: {error}") from error
    finally:
        os.close(write_fd)


def _output(
    process: subprocess.Popen[bytes], fd: int, deadline_s: float, stop: threading.Event
) -> str:
    """Read output until its end, the deadline or `stop`, or until the program has ended and wrote
    nothing for a moment; return the last of it, as the end of an error message."""
    tail = b""
    while time.monotonic() < deadline_s and not stop.is_set():
        if select.select([fd], [], [], _POLL_S)[0]:
            data = os.read(fd, 1 << 16)
            if not data:
                break
            tail = (tail + data)[-_OUTPUT_BYTES:]
        elif process.poll() is not None:
            break  # something that the ended program has started still has the pipe
    text = tail.decode(errors="replace").strip()
    return f"; its last output:\n{text}" if text else "; it wrote nothing"


def _ended(process: subprocess.Popen[bytes], deadline_s: float) -> bool:
    """Return whether a process ends in time; kill what is left of its session."""
    try:
        process.wait(max(0.0, deadline_s - time.monotonic()))
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
    _kill_session(process.pid)
    process.wait()
    return ended


def _kill_session(leader_pid: int) -> None:
    # Not killpg: a shell with job control, or timeout(1), makes process groups of its own. A
    # process that starts others while it is killed needs another round. The kernel does not reuse
    # the leader's pid while its session has processes.
    for _ in range(_KILL_ROUNDS):
        left = [found.pid for found in other_processes() if found.session == leader_pid]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _status(returncode: int) -> str:
    return f"exited with {returncode}" if returncode > 0 else f"was killed by signal {-returncode}"

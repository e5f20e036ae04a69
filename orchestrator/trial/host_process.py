"""Starts a logical host: a host agent as a child process, with its own memory budget.

The child has the read end of a pipe, its lifeline; only this process has the write end. When this
process ends, even if killed, the kernel closes the write end. The host agent then destroys its
guests and exits.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused, TransientError
from hintfleet.settings import Driver

# libvirt waits 10 s for a QEMU that does not react to SIGTERM, then kills it
# (virProcessKillPainfullyDelay in src/util/virprocess.c). A host agent that we kill before its
# guests have ended leaves their folders. On a machine with ten times as much to do as it has
# processors, a host agent needed more than 25 s to end.
_STOP_TIMEOUT_S = 60.0
_LOG_TAIL_BYTES = 1500


@dataclass(frozen=True, kw_only=True)
class LogicalHost:
    """How to start a logical host.

    :ivar driver: of its guests, which a cgroup keeps within the budget where one can be made.
    :ivar libvirt_uri: empty for the host agent's default.
    """

    name: str
    memory_budget_bytes: int
    driver: Driver
    libvirt_uri: str = ""
    start_timeout_s: float = 20.0


class HostProcess:
    """A running host agent. Create it with `start`, end it with `stop`.

    :ivar address: the address of its control API.
    """

    def __init__(
        self,
        host: LogicalHost,
        folder: Path,
        process: asyncio.subprocess.Process,
        lifeline_fd: int,
    ) -> None:
        self.address = ""
        self._host = host
        self._folder = folder
        self._process = process
        self._lifeline_fd = lifeline_fd

    @classmethod
    async def start(cls, host: LogicalHost, folder: Path) -> HostProcess:
        """Start a host agent and wait until it serves.

        After a failure the host agent has ended, and the folder is removed.

        :param folder: created here and removed by `stop`. Its path must be short enough for a
            unix socket in it.
        :raises Refused: the host agent ended at start; the hint has the end of its log.
        :raises TransientError: the host agent did not serve in time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # os.pipe() sets close-on-exec, so a child inherits only the ends that are passed to it. If
        # another child held the write end, too, the lifeline would outlive this process.
        lifeline_read, lifeline_write = os.pipe()
        # The host agent writes its address into this pipe when it listens: no polling, and no
        # start-up race. If the host agent ends before that, the pipe is at end of file.
        ready_read, ready_write = os.pipe()
        try:
            process = await _spawn(host, folder, ready_write, lifeline_read)
        except BaseException:
            os.close(lifeline_write)
            os.close(ready_read)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(ready_write)
            os.close(lifeline_read)
        running = cls(host, folder, process, lifeline_write)
        try:
            running.address = await running._wait_ready(ready_read)
        except BaseException:
            await running.stop()
            raise
        return running

    async def _wait_ready(self, ready_fd: int) -> str:
        line = await _read_line(ready_fd, self._host.start_timeout_s)
        if line is None:
            raise TransientError(
                f"host agent {self._host.name} did not serve within "
                f"{self._host.start_timeout_s:g} s",
                hint=f"the end of its log:\n{self.log_tail()}",
            )
        if not line:
            await self._process.wait()
            raise Refused(
                f"host agent {self._host.name} ended at start with exit code "
                f"{self._process.returncode}",
                hint=f"the end of its log:\n{self.log_tail()}",
            )
        return str(json.loads(line)["control"])

    @property
    def running(self) -> bool:
        """Whether the host agent runs."""
        return self._process.returncode is None

    def log_tail(self) -> str:
        """Return the end of the host agent's log, 1500 bytes at most; empty if there is none."""
        try:
            log = (self._folder / "log").read_bytes()
        except OSError:
            return ""
        return log[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()

    async def stop(self) -> None:
        """End the host agent with its guests, and remove its folder. May be called twice."""
        if self._lifeline_fd >= 0:
            os.close(self._lifeline_fd)
            self._lifeline_fd = -1
        if self._process.returncode is None:
            self._process.terminate()
            # No timeout that cancels: this may run in a task that was cancelled before, and then
            # asyncio.timeout raises no TimeoutError before Python 3.11.3 (python/cpython#102780).
            ended = asyncio.create_task(self._process.wait())
            await asyncio.wait((ended,), timeout=_STOP_TIMEOUT_S)
            if not ended.done():
                self._process.kill()
            await ended
        shutil.rmtree(self._folder, ignore_errors=True)


async def _spawn(
    host: LogicalHost, folder: Path, ready_fd: int, lifeline_fd: int
) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "host_agent"]
    command += ["--name", host.name]
    command += ["--listen", f"unix:{folder}/control"]
    command += ["--memory-budget", f"{host.memory_budget_bytes}B"]
    command += ["--enforce-budget", host.driver]
    command += ["--ready-fd", str(ready_fd)]
    command += ["--lifeline-fd", str(lifeline_fd)]
    if host.libvirt_uri:
        command += ["--libvirt-uri", host.libvirt_uri]
    with (folder / "log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(ready_fd, lifeline_fd),
            # A terminal sends Ctrl-C to its whole foreground process group. In a session of its
            # own, the host agent does not get the signal; `stop` ends the host agent in order.
            start_new_session=True,
        )


async def _read_line(fd: int, timeout_s: float) -> bytes | None:
    """Read one line from a pipe, then close the pipe; b"" at end of file, None on timeout."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb")
    )
    try:
        async with asyncio.timeout(timeout_s):
            return await reader.readline()
    except TimeoutError:
        return None
    finally:
        transport.close()

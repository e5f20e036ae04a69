"""A host agent that can be killed and started again while its guests live on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hintfleet.net.channels import open_aio_channel
from hintfleet.v1.host_pb2_grpc import HostServiceStub
from tests.support.lab import processes_with
from tests.support.relay import Address, Relay

if TYPE_CHECKING:  # HostServiceAsyncStub is in the .pyi file only
    from hintfleet.v1.host_pb2_grpc import HostServiceAsyncStub

_START_S = 60.0
_STOP_S = 60.0
_MARK = "HINTFLEET_TORTURE"
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class HostAgent:
    """Runs one host agent with `--state` after another. All have the same control address, and
    guests reach all of them through the relay.

    :param module: the module to run; a test runs one with a planted bug.
    """

    def __init__(
        self,
        folder: Path,
        relay: Relay,
        arguments: Sequence[str],
        module: str,
        environment: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._relay = relay
        self._arguments = arguments
        self._module = module
        self._environment = os.environ | environment | {_MARK: str(folder)}
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline = -1
        self._log = (folder / "host.log").open("ab")
        self.control = f"unix:{folder}/host.sock"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[HostServiceAsyncStub]:
        """Run a host agent until the block ends; yield a client that works across restarts."""
        await self.start()
        try:
            async with open_aio_channel(self.control, options=_OPTIONS) as channel:
                yield HostServiceStub(channel)
        finally:
            await self._stop()
            self._log.close()

    async def start(self) -> None:
        """Start a host agent, or the successor of a killed one, and wait until it serves.

        :raises RuntimeError: it ended before it served.
        :raises TimeoutError: it did not serve within _START_S.
        """
        ready_read, ready_write = os.pipe()
        lifeline_read, lifeline = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(ready_write, lifeline_read),
                pass_fds=(ready_write, lifeline_read),
                stderr=self._log,
                env=self._environment,
                # In a process session of its own, so that Ctrl-C does not reach it: with --state,
                # it would end, and leave its guests running.
                start_new_session=True,
            )
        finally:
            os.close(ready_write)
            os.close(lifeline_read)
        self._let_go()
        self._lifeline = lifeline
        with open(ready_read) as ready:
            async with asyncio.timeout(_START_S):
                said = await asyncio.to_thread(ready.readline)
        if not said:
            raise RuntimeError(f"the host agent did not start:\n{self.log_tail()}")
        self._relay.upstream = Address.parse(json.loads(said)["guest"])

    def _command(self, ready_fd: int, lifeline_fd: int) -> Sequence[str]:
        return (
            *(sys.executable, "-m", self._module),
            *("--listen", self.control, "--state", str(self._folder / "state")),
            *self._arguments,
            *("--ready-fd", str(ready_fd), "--lifeline-fd", str(lifeline_fd)),
        )

    def signal(self, number: int) -> None:
        """Send a signal to the host agent.

        :raises ProcessLookupError: it is dead, or was never started.
        """
        if self._process is None or self._process.returncode is not None:
            raise ProcessLookupError
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the host agent with SIGKILL. Its lifeline stays open: else the host agent would end
        its guests before it is killed."""
        self.signal(signal.SIGKILL)

    async def wait_dead(self) -> None:
        """Wait until a killed host agent is gone."""
        if self._process is not None:
            await self._process.wait()

    def log_tail(self) -> str:
        """Return the last lines of the log that all host agents write."""
        text = (self._folder / "host.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-30:])

    def left_behind(self) -> list[str]:
        """Return the command lines of all processes that still live: of the host agents, and of the
        processes that they started."""
        return list(processes_with(_MARK, str(self._folder)).values())

    def _let_go(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    async def _stop(self) -> None:
        """Stop the host agent by its lifeline, as when its parent dies: it ends its guests, too.

        :raises RuntimeError: it did not stop within _STOP_S, and was killed.
        """
        self._let_go()
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            raise RuntimeError(f"the host agent did not stop:\n{self.log_tail()}") from None

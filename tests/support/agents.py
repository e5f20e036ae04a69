"""A real host agent, in its own process or in a thread of this one, and a client of its control
API. Also helpers that wait for a condition and look at processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc

from hintfleet.net.channels import open_channel
from hintfleet.net.tls import Tls
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceStub
from host_agent.registry import Registry
from host_agent.server import Serving, Settings, serving

TRIAL = "test-trial"

LOG_LEVEL = "info"
"""Of the host agents that `running_host_agent` starts; a test that fails shows their logs."""

HANG_S = 900.0
"""How long to wait before a test fails, where nothing else is said. What works takes less, even on
a busy machine."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = HANG_S) -> None:
    """Wait until `condition` returns True; fail after `timeout_s`, and name `what` in the error."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@dataclass(kw_only=True)
class HostClient:
    """A client of a host agent's control API."""

    stub: HostServiceStub
    guest_address: str
    samples: list[host_pb2.SampleSet] = field(default_factory=list)

    def watch(self, trial_id: str = TRIAL, timeout_s: float = 4 * HANG_S) -> grpc.RpcContext:
        """Open a Watch, which keeps a trial's guests alive; return it after its first sample.

        A thread appends all samples to `samples`.
        """
        request = host_pb2.WatchRequest(trial_id=trial_id, period_ms=50)
        call = self.stub.Watch(request, timeout=timeout_s)
        seen = threading.Event()

        def read() -> None:
            with contextlib.suppress(grpc.RpcError):
                for sample in call:
                    self.samples.append(sample)
                    seen.set()

        threading.Thread(target=read, daemon=True).start()
        assert seen.wait(HANG_S)
        return call

    def create(
        self,
        name: str = "g",
        *,
        method: host_pb2.Method.ValueType = host_pb2.HINTING,
        hinting: host_pb2.HintingSettings | None = None,
        memory_bytes: int = 128 * MIB,
        max_memory_bytes: int = 0,
        uuid: str = "",
    ) -> host_pb2.Guest:
        """Create an embedded guest in trial TRIAL; call `watch` first."""
        spec = host_pb2.GuestSpec(
            driver=host_pb2.EMBEDDED,
            memory_bytes=memory_bytes,
            max_memory_bytes=max_memory_bytes,
            method=method,
            hinting=hinting,
        )
        command = host_pb2.CommandId(trial_id=TRIAL)
        request = host_pb2.CreateGuestRequest(command=command, name=name, spec=spec, uuid=uuid)
        return self.stub.CreateGuest(request, timeout=HANG_S)

    def allocate(
        self, size_bytes: int, name: str = "g", block_bytes: int = 0
    ) -> host_pb2.RunStepResponse:
        return self._step(
            guest_name=name, allocate_bytes=size_bytes, seed=1, block_bytes=block_bytes
        )

    def free(self, size_bytes: int, name: str = "g") -> host_pb2.RunStepResponse:
        return self._step(guest_name=name, free_bytes=size_bytes, seed=1)

    def verify(self, name: str = "g") -> host_pb2.RunStepResponse:
        return self._step(guest_name=name, verify=True)

    def loop(
        self, pattern: hinting_pb2.Loop.Pattern.ValueType, name: str = "g", **settings: int
    ) -> host_pb2.RunStepResponse:
        return self._step(guest_name=name, loop=hinting_pb2.Loop(pattern=pattern, **settings))

    def _step(self, **step: Any) -> host_pb2.RunStepResponse:
        return self.stub.RunStep(host_pb2.RunStepRequest(**step), timeout=HANG_S)

    def resize(
        self, memory_bytes: int, name: str = "g", command: host_pb2.CommandId | None = None
    ) -> host_pb2.Guest:
        request = host_pb2.ResizeGuestRequest(command=command, name=name, memory_bytes=memory_bytes)
        return self.stub.ResizeGuest(request, timeout=HANG_S)

    def settle(self, name: str = "g") -> host_pb2.SettleResponse:
        return self.stub.Settle(host_pb2.SettleRequest(guest_name=name), timeout=HANG_S)

    def pause_hinting(self, for_s: float, name: str = "g") -> float:
        """Pause a guest's hinting; return for how many more seconds an earlier pause would have
        lasted, 0 if there was none."""
        request = host_pb2.PauseHintingRequest(name=name, for_ms=round(for_s * 1000))
        return self.stub.PauseHinting(request, timeout=HANG_S).left_ms / 1000

    def guests(self) -> dict[str, host_pb2.Guest]:
        listed = self.stub.ListGuests(host_pb2.ListGuestsRequest(), timeout=HANG_S)
        return {guest.name: guest for guest in listed.guests}


@dataclass(kw_only=True)
class HostAgent(HostClient):
    """A client of a host agent that runs in a process of its own."""

    process: subprocess.Popen[bytes]
    control: str
    lifeline_fd: int

    def cut_lifeline(self) -> None:
        """Close the lifeline, as the kernel does when the process that started the agent dies."""
        if self.lifeline_fd >= 0:
            os.close(self.lifeline_fd)
            self.lifeline_fd = -1


@dataclass(kw_only=True)
class InProcessHost(HostClient):
    """A client of a host agent in a thread of this process, whose registry a test can read."""

    registry: Registry

    def token(self, name: str) -> str:
        return self.registry.get(name).token


@contextlib.contextmanager
def host_in_process(guest_tls: Tls | None = None) -> Iterator[InProcessHost]:
    """Run the servers of `hintfleet-host` on an event loop in a thread, until the block ends."""
    started: queue.Queue[Serving] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve(folder: str) -> None:
        settings = Settings(
            name="in-process",
            listen=f"unix:{folder}/host.sock",
            guest_listen="127.0.0.1:0",
            memory_budget_bytes=1 << 30,
            libvirt_uri="test:///default",
            guest_tls=guest_tls,
        )
        async with serving(settings) as served:
            started.put(served)
            await stop.wait()

    with tempfile.TemporaryDirectory(prefix="hf-test-") as folder:
        # If the servers hang while they start, nobody stops the thread. As it is a daemon thread,
        # the test process can end all the same.
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(serve(folder)), daemon=True
        )
        thread.start()
        served = started.get(timeout=HANG_S)
        try:
            with open_channel(served.control) as channel:
                yield InProcessHost(
                    stub=HostServiceStub(channel),
                    guest_address=served.guest,
                    registry=served.registry,
                )
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(HANG_S)
            assert not thread.is_alive()
            loop.close()


@contextlib.contextmanager
def running_host_agent(
    *arguments: str,
    stderr: IO[bytes] | None = None,
    module: str = "host_agent",
    prefix: tuple[str, ...] = (),
) -> Iterator[HostAgent]:
    """Run a host agent until the block ends; then close its lifeline, so that it ends.

    Checks that the host agent ends with exit code 0, unless it was killed by SIGKILL. Waits until
    the child processes that it had at the end of the block are gone, too.

    :param prefix: words to put before the command, such as `ip netns exec NAME`.
    """
    ready_read, ready_write = os.pipe()
    lifeline_read, lifeline_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="hf-test-") as folder:
        address = f"unix:{folder}/host.sock"
        process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", module, "--listen", address),
                *("--ready-fd", str(ready_write), "--lifeline-fd", str(lifeline_read)),
                *("--log-level", LOG_LEVEL),
                *arguments,  # the last ones: they override the options above
            ],
            pass_fds=(ready_write, lifeline_read),
            stderr=stderr,
        )
        os.close(ready_write)
        os.close(lifeline_read)
        with open(ready_read) as ready:
            addresses = json.loads(ready.readline())
        # A connection pool for this channel alone: else gRPC reuses the connection to an earlier
        # agent at this address.
        alone = (("grpc.use_local_subchannel_pool", 1),)
        channel = open_channel(addresses["control"], options=alone)
        agent = HostAgent(
            process=process,
            guest_address=addresses["guest"],
            stub=HostServiceStub(channel),
            control=addresses["control"],
            lifeline_fd=lifeline_write,
        )
        try:
            yield agent
        finally:
            children = child_pids(process.pid)
            agent.cut_lifeline()
            try:
                process.wait(HANG_S)
            finally:
                process.kill()
                channel.close()
            wait_until(lambda: not any(map(alive, children)), "the guests to end with their host")
        assert process.returncode in (0, -9), f"the host agent ended with {process.returncode}"


def child_pids(pid: int) -> list[int]:
    """Return the ids of the child processes of process `pid`, of all its threads."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, children.read_text().split())
    return found

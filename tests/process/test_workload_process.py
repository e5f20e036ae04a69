"""The workload of a real guest, as a process on this machine: it has anonymous memory, a page cache
and programs. It does the steps of an embedded guest, whose own process is suspended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from hintfleet.agent_config import AgentConfig
from hintfleet.units import MIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2 import Loop, RunProgram
from tests.support.agents import HANG_S, InProcessHost, host_in_process


@pytest.fixture(scope="module")
def host() -> Iterator[InProcessHost]:
    with host_in_process() as made:
        made.watch()
        guest = made.create(method=host_pb2.NONE)
        os.kill(guest.pid, signal.SIGSTOP)
        config = AgentConfig(
            server=made.guest_address,
            guest_uuid=guest.uuid,
            token=made.token("g"),
            programs=("sh",),
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "guest_agent", "--workload-only", "--config", "-"],
            stdin=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(config.to_json() + "\n")
            process.stdin.flush()
            yield made
        finally:
            process.kill()
            process.communicate()
            os.kill(guest.pid, signal.SIGCONT)


@pytest.mark.parametrize("pattern", [Loop.CHURN, Loop.FAULT, Loop.BANDWIDTH])
def test_loops_in_anonymous_memory(host: InProcessHost, pattern: Loop.Pattern.ValueType) -> None:
    host.allocate(16 * MIB, block_bytes=64 << 10)
    done = host.loop(pattern, size_bytes=16 * MIB, duration_ms=300)
    assert done.looped.touched_bytes > 0
    assert done.wrong_pages == 0
    assert host.verify().verified_pages == 16 * MIB // PAGE_BYTES
    assert host.free(16 * MIB).held_bytes == 0


def program(host: InProcessHost, *arguments: str, timeout_ms: int = 60_000) -> None:
    order = RunProgram(arguments=arguments, timeout_ms=timeout_ms)
    request = host_pb2.RunStepRequest(guest_name="g", run_program=order)
    host.stub.RunStep(request, timeout=HANG_S)


def test_programs_run_if_the_configuration_allows_them(host: InProcessHost) -> None:
    program(host, "sh", "-c", "exit 0")
    for arguments, said in (
        (
            ("sh", "-c", "echo no rule to make it; exit 2"),
            "exited with 2; its last output:\nno rule",
        ),
        (("bash", "-c", "exit 0"), "the agent's configuration does not allow it"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            program(host, *arguments)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert said in str(caught.value.details())
    with pytest.raises(grpc.RpcError) as caught:
        program(host, "sh", timeout_ms=86_400_001)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

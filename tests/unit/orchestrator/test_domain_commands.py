"""Commands about domains, on a link that breaks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hintfleet.v1 import host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceServicer, add_HostServiceServicer_to_server
from orchestrator.cli import run_command


class HostAgent(HostServiceServicer):
    """A host agent whose link breaks before the first answer to each command."""

    def __init__(self) -> None:
        self.asked: list[host_pb2.CommandId] = []

    def AttachGuest(  # noqa: N802 - the generated name
        self, request: host_pb2.AttachGuestRequest, context: grpc.ServicerContext
    ) -> host_pb2.AttachGuestResponse:
        self._note(request.command, context)
        return host_pb2.AttachGuestResponse(agent_config="{}")

    def DetachGuest(  # noqa: N802 - the generated name
        self, request: host_pb2.DetachGuestRequest, context: grpc.ServicerContext
    ) -> host_pb2.DetachGuestResponse:
        self._note(request.command, context)
        return host_pb2.DetachGuestResponse()

    def _note(self, command: host_pb2.CommandId, context: grpc.ServicerContext) -> None:
        self.asked.append(command)
        if len(self.asked) % 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")


@pytest.fixture
def host_agent() -> HostAgent:
    return HostAgent()  # type: ignore[abstract]  # it is asked for nothing else


@pytest.fixture
def address(host_agent: HostAgent, tmp_path: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    add_HostServiceServicer_to_server(host_agent, server)
    path = f"unix:{tmp_path}/host.sock"
    server.add_insecure_port(path)
    server.start()
    yield path
    server.stop(0).wait()


def test_a_command_that_grpc_sends_again_is_the_same_command(
    host_agent: HostAgent, address: str
) -> None:
    """So the host agent answers it, and does not say that the domain is attached already."""
    for command in ("attach", "detach", "attach"):
        assert run_command([command, "db", "--host", address]) == 0
    ids = [(one.run_id, one.sequence) for one in host_agent.asked]
    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == 3
    assert all(one.sequence for one in host_agent.asked)

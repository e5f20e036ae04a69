"""The fleet service and its client, with large numbers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.results.savings import By
from orchestrator.service.queries import ask_server
from orchestrator.service.server import FleetService
from tests.support.stored import store_run

GUESTS = 30_000


class Large(fleet_pb2_grpc.FleetServiceServicer):
    """A fleet with many guests."""

    def QuerySavings(  # noqa: N802 - the generated name
        self, request: fleet_pb2.QuerySavingsRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.QuerySavingsResponse:
        row = fleet_pb2.Savings(experiment="e" * 40, run_id="r" * 26, arm="a" * 40, key="k" * 40)
        return fleet_pb2.QuerySavingsResponse(rows=[row] * GUESTS)


@contextmanager
def served(service: fleet_pb2_grpc.FleetServiceServicer, folder: Path) -> Iterator[str]:
    address = f"unix:{folder}/fleet.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield address
    finally:
        server.stop(None).wait()


def test_an_answer_may_be_larger_than_grpc_takes_by_default(tmp_path: Path) -> None:
    with served(Large(), tmp_path) as address:  # type: ignore[abstract]
        assert len(ask_server(address, By.GUEST)) == GUESTS


def test_any_time_may_be_asked_for(tmp_path: Path) -> None:
    store_run(tmp_path)
    with served(FleetService(tmp_path), tmp_path) as address:
        assert len(ask_server(address, By.FLEET, since_unix_s=-(1 << 63))) == 2
        assert ask_server(address, By.FLEET, since_unix_s=(1 << 63) - 1) == []

"""What a client of the fleet service takes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.results.savings import By
from orchestrator.service.queries import ask_server

GUESTS = 30_000


class Large(fleet_pb2_grpc.FleetServiceServicer):
    """A fleet with many guests."""

    def QuerySavings(  # noqa: N802 - the generated name
        self, request: fleet_pb2.QuerySavingsRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.QuerySavingsResponse:
        row = fleet_pb2.Savings(experiment="e" * 40, run_id="r" * 26, arm="a" * 40, key="k" * 40)
        return fleet_pb2.QuerySavingsResponse(rows=[row] * GUESTS)


def test_an_answer_may_be_larger_than_grpc_takes_by_default(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/fleet.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(Large(), server)  # type: ignore[abstract]
    server.add_insecure_port(address)
    server.start()
    try:
        assert len(ask_server(address, By.GUEST)) == GUESTS
    finally:
        server.stop(None).wait()

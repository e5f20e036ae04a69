"""Serves the fleet service (runs and their savings), health checks and reflection, over gRPC."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hintfleet.errors import HintfleetError, InvalidInput, to_status
from hintfleet.net.tls import Role, Tls, check_role, listen
from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.results.savings import By, Savings
from orchestrator.results.store.reader import Store
from orchestrator.service.messages import BY_PB2, run_as_pb2, savings_as_pb2
from orchestrator.service.queries import ask_store

SERVICE_NAME = fleet_pb2.DESCRIPTOR.services_by_name["FleetService"].full_name
_DEFAULT_LIMIT = 100
_MAX_LIMIT = 10_000
# A client that asks for reflection keeps a worker for as long as its stream is open.
_WORKERS = 32
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    # So that a client whose machine is gone keeps no worker.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_GRACE_S = 2.0
_Answer = TypeVar("_Answer")


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Answers queries from the store in one folder."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def ListRuns(
        self, request: fleet_pb2.ListRunsRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.ListRunsResponse:
        """Return runs, newest first: at most `limit` (100 if it is 0), and at most 10,000."""
        limit = min(request.limit or _DEFAULT_LIMIT, _MAX_LIMIT)
        runs = self._ask(lambda store: store.runs(limit), context)
        return fleet_pb2.ListRunsResponse(runs=map(run_as_pb2, runs))

    def QuerySavings(
        self, request: fleet_pb2.QuerySavingsRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.QuerySavingsResponse:
        """Return the savings of ended runs."""
        rows = self._ask(lambda store: _savings(store, request), context)
        return fleet_pb2.QuerySavingsResponse(rows=map(savings_as_pb2, rows))

    def _ask(
        self, question: Callable[[Store], list[_Answer]], context: grpc.ServicerContext
    ) -> list[_Answer]:
        try:
            check_role(context.auth_context(), Role.OPERATOR)
            # Opened for each call: a connection of sqlite3 belongs to the thread that made it,
            # and opening the store also finds runs that were abandoned since the last call.
            with Store(self._data_dir) as store:
                return question(store)
        except HintfleetError as error:
            code, details, metadata = to_status(error)
            context.set_trailing_metadata(metadata)
            context.abort(code, details)


def _savings(store: Store, request: fleet_pb2.QuerySavingsRequest) -> list[Savings]:
    by = next((by for by, value in BY_PB2.items() if value == request.by), None)
    if by is None:
        raise InvalidInput("by is not set", hint="FLEET, HOST, GUEST or ARM")
    return ask_store(store, by, request.run_id, request.since_unix_s)


def serve(
    address: str, data_dir: Path, ready: Callable[[str], None], tls: Tls | None = None
) -> None:
    """Serve until SIGTERM or SIGINT. Call from the main thread.

    :param ready: called with the bound address when the server serves.
    :raises InvalidInput: the address is not valid, or needs TLS.
    :raises Refused: the address cannot be bound, or the store cannot be used.
    """
    # Query the store once now, so that a store that cannot be used is an error at the start, not at
    # the first call, and so that the modules for queries are imported.
    with Store(data_dir) as store:
        ask_store(store, By.FLEET)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server, bound = _bind(address, FleetService(data_dir), tls)
    # A full garbage collection walks through all modules, and would delay a call by 20 ms and more
    # now and then: what is frozen is skipped.
    gc.freeze()
    server.start()
    ready(bound)
    stop.wait()
    server.stop(_GRACE_S).wait()


def _bind(address: str, service: FleetService, tls: Tls | None) -> tuple[grpc.Server, str]:
    # gRPC sets SO_REUSEPORT by default on Linux: a second server could then bind the same address
    # and would get a part of the calls. Without SO_REUSEPORT, the second bind is an error.
    server = grpc.server(ThreadPoolExecutor(_WORKERS), options=_OPTIONS)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, server)
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    # The name "" means the server as a whole; health probes ask for it
    # (grpc/doc/health-checking.md).
    for name in ("", SERVICE_NAME):
        state.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server, listen(server, address, tls)

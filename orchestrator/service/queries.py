"""Asks the store, or a fleet service, for runs and savings. Both give the same answer, except that
the service rounds the bytes of footprints and of the control to whole numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from hintfleet.errors import from_rpc_error
from hintfleet.net.channels import open_channel
from hintfleet.net.tls import Tls, client_credentials
from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.results.savings import By, Savings, aggregate
from orchestrator.results.store.reader import LATEST, Store
from orchestrator.service.messages import BY_PB2, run_as_pb2, savings_from_pb2

_TIMEOUT_S = 30.0
_MOST_RUNS = 10_000
# gRPC's default is 4 MiB: about 20,000 rows, as of 1000 guests under four arms in five runs. An
# answer has no limit of its own, and comes from the service that the user has named.
_OPTIONS = (("grpc.max_receive_message_length", -1),)


def ask_store(store: Store, by: By, run: str = "", since_unix_s: int = 0) -> list[Savings]:
    """Return the savings of ended runs from the store, newest run first.

    :param run: only this run: an id, a unique part of an id, or `latest`; empty for all.
    :param since_unix_s: only runs that started at or after this time; 0 for all.
    :raises InvalidInput: there is no such run, or more than one.
    """
    run_id = store.find_run(run).run_id if run else ""
    rows = store.footprint_rows(run_id, since_unix_s, of_guests=by is By.GUEST)
    return aggregate(rows, by)


def ask_server(
    address: str, by: By, run: str = "", since_unix_s: int = 0, tls: Tls | None = None
) -> list[Savings]:
    """Return the savings of ended runs from the fleet service at `address`.

    Parameters are as in `ask_store`.

    :raises InvalidInput: there is no such run or more than one, the address is not valid, or it
        needs TLS.
    :raises TransientError: no service can be reached at the address.
    :raises OutcomeUnknown: the service did not answer within 30 s.
    """
    request = fleet_pb2.QuerySavingsRequest(by=BY_PB2[by], run_id=run, since_unix_s=since_unix_s)
    with _service(address, tls) as service:
        answer = service.QuerySavings(request, timeout=_TIMEOUT_S)
    return [savings_from_pb2(row) for row in answer.rows]


def store_runs(store: Store) -> list[fleet_pb2.Run]:
    """Return the newest 10,000 runs of the store, newest first."""
    return [run_as_pb2(run) for run in store.runs(_MOST_RUNS)]


def server_runs(address: str, tls: Tls | None = None) -> list[fleet_pb2.Run]:
    """Return the newest 10,000 runs of the fleet service at `address`, newest first.

    Raises the errors of `ask_server`, except those about a run.
    """
    with _service(address, tls) as service:
        request = fleet_pb2.ListRunsRequest(limit=_MOST_RUNS)
        return list(service.ListRuns(request, timeout=_TIMEOUT_S).runs)


def not_done(
    runs: Sequence[fleet_pb2.Run], run: str = "", since_unix_s: int = 0
) -> list[fleet_pb2.Run]:
    """Return the runs that a savings query covers and whose state is not done. Pure.

    :param runs: newest first.
    :param run: as in `ask_store`.
    :param since_unix_s: as in `ask_store`.
    """
    asked = [found for found in runs if run in ("", LATEST) or run.lower() in found.run_id]
    return [
        found
        for found in (asked[:1] if run == LATEST else asked)
        if found.state != "done" and found.started_unix_s >= since_unix_s
    ]


@contextmanager
def _service(address: str, tls: Tls | None) -> Iterator[fleet_pb2_grpc.FleetServiceStub]:
    with open_channel(address, client_credentials(address, tls), _OPTIONS) as channel:
        try:
            yield fleet_pb2_grpc.FleetServiceStub(channel)
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"fleet service at {address}") from error

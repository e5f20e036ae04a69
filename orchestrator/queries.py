"""The savings query, from the store or from a fleet service: the same answer either way."""

from __future__ import annotations

import grpc

from hintfleet.errors import InvalidInput, NotFound, from_rpc_error
from hintfleet.tls import Tls, client_credentials
from hintfleet.v1 import fleet_pb2, fleet_pb2_grpc
from orchestrator.fleet_messages import BY_PB2, savings_from_pb2
from orchestrator.savings import By, Savings
from orchestrator.store.reader import Store

_TIMEOUT_S = 30.0


def ask_store(store: Store, by: By, run: str = "", since_unix_s: int = 0) -> list[Savings]:
    """What ended runs saved; the newest first.

    :param run: only this run: an id, an unambiguous part of one, or `latest`.
    :raises InvalidInput: there is no such run.
    """
    try:
        run_id = store.find_run(run).run_id if run else ""
    except NotFound as error:
        raise InvalidInput(error.message, hint=error.hint) from error
    return store.savings(by, run_id, since_unix_s)


def ask_server(
    address: str, by: By, run: str = "", since_unix_s: int = 0, tls: Tls | None = None
) -> list[Savings]:
    """The same from the fleet service at `address`.

    :raises TransientError: no service answers there.
    :raises InvalidInput: the address needs TLS.
    """
    request = fleet_pb2.QuerySavingsRequest(by=BY_PB2[by], run_id=run, since_unix_s=since_unix_s)
    with _channel(address, tls) as channel:
        try:
            answer = fleet_pb2_grpc.FleetServiceStub(channel).QuerySavings(
                request, timeout=_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"fleet service at {address}") from error
    return [savings_from_pb2(row) for row in answer.rows]


def _channel(address: str, tls: Tls | None) -> grpc.Channel:
    options = (("grpc.enable_http_proxy", 0),)
    credentials = client_credentials(address, tls)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)

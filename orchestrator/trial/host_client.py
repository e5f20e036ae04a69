"""A host agent as its control API shows it: calls with deadlines, errors of our own tree.

Every command bears a CommandId, so a repeated one is answered and not done
twice; that is why gRPC may retry them here.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable
from types import TracebackType
from typing import TypeVar

import grpc
import grpc.aio

from hintfleet.errors import from_rpc_error
from hintfleet.net.channels import open_aio_channel
from hintfleet.net.tls import Tls, client_credentials
from hintfleet.v1 import host_pb2, host_pb2_grpc
from orchestrator.spec.model import Timeouts

_Answer = TypeVar("_Answer")

# Retried only where the call surely did not pass or may be repeated (see above).
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "hintfleet.v1.HostService"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_receive_message_length", 16 << 20),
)


class HostClient:
    """The client of one host agent. Use as an async context manager.

    Every method raises an error of the tree in hintfleet.errors: TransientError if
    the host agent cannot be reached, OutcomeUnknown if its answer did not come in time.
    """

    def __init__(self, address: str, timeouts: Timeouts, tls: Tls | None = None) -> None:
        """:raises InvalidInput: the address is not of this machine, and there is no TLS."""
        self._address = address
        self._timeouts = timeouts
        self._channel = open_aio_channel(address, client_credentials(address, tls), _OPTIONS)
        self._stub: host_pb2_grpc.HostServiceAsyncStub = host_pb2_grpc.HostServiceStub(
            self._channel
        )

    async def __aenter__(self) -> HostClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; a Watch that is open ends, and its guests with it."""
        await self._channel.close(None)

    async def get_host(self, driver: host_pb2.Driver.ValueType, wait: bool) -> host_pb2.Host:
        """What the host is, and whether it can run guests of this driver.

        :param wait: for a host agent that is not there yet.
        """
        request = host_pb2.GetHostRequest(drivers=[driver])
        call = self._stub.GetHost(request, timeout=self._timeouts.connect_s, wait_for_ready=wait)
        return await self._answer(call, "GetHost")

    async def create_guest(self, request: host_pb2.CreateGuestRequest) -> host_pb2.Guest:
        """Make a guest and wait until it is ready to work."""
        call = self._stub.CreateGuest(request, timeout=self._timeouts.create_s)
        return await self._answer(call, f"creating guest {request.name}")

    async def run_step(self, request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        """Have a guest do one step of the workload."""
        call = self._stub.RunStep(request, timeout=self._timeouts.step_s)
        return await self._answer(call, f"{request.WhichOneof('step')} on {request.guest_name}")

    async def settle(self, guest_name: str) -> host_pb2.SettleResponse:
        """Have a guest give back all that it can, now."""
        timeout_s = self._timeouts.settle_s
        request = host_pb2.SettleRequest(guest_name=guest_name, timeout_ms=int(timeout_s * 1000))
        # The host agent says better what was not settled in time, so it goes first.
        call = self._stub.Settle(request, timeout=timeout_s + 5)
        return await self._answer(call, f"settling {guest_name}")

    async def destroy_guest(
        self, request: host_pb2.DestroyGuestRequest
    ) -> host_pb2.DestroyGuestResponse:
        """End a guest and free all that it held."""
        call = self._stub.DestroyGuest(request, timeout=self._timeouts.destroy_s)
        return await self._answer(call, f"destroying guest {request.name}")

    async def watch(self, trial_id: str, period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        """Samples of a trial's guests, until closed. Without a deadline: it is what
        keeps the trial's guests alive."""
        request = host_pb2.WatchRequest(trial_id=trial_id, period_ms=round(period_s * 1000))
        call = self._stub.Watch(request)
        try:
            async for samples in call:
                yield samples
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"{self._address}: watching") from error
        finally:
            call.cancel()

    async def _answer(self, call: Awaitable[_Answer], what: str) -> _Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"{self._address}: {what}") from error

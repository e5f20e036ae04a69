"""Calls the control API of a host agent; raises errors of hintfleet.errors. Every call except Watch
and WatchHost has a deadline."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio

from hintfleet.errors import HintfleetError, OutcomeUnknown, TransientError, from_rpc_error
from hintfleet.net.addresses import is_unix
from hintfleet.net.channels import open_aio_channel
from hintfleet.net.tls import Tls, client_credentials
from hintfleet.v1 import host_pb2, host_pb2_grpc
from orchestrator.spec.model import Timeouts

_Answer = TypeVar("_Answer")
_SampleCall = grpc.aio.UnaryStreamCall[Any, host_pb2.SampleSet]

# gRPC retries a call that failed with UNAVAILABLE, although the host agent may have carried it
# out before the connection broke. That is safe: each command has a CommandId, and the host agent
# answers a repeated command without doing it twice. Repeating any other call does no harm; but
# PauseHinting then answers with what is left of the pause that its first attempt has set.
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
_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", _SERVICE_CONFIG),
    # gRPC's default is 4 MiB; a sample set, with a sample of each guest of a trial, may be larger.
    ("grpc.max_receive_message_length", 16 << 20),
)
# If a host has sent nothing for 20 s while a call is open, gRPC pings it; if it does not answer
# within 30 s, all calls fail. Without this it is noticed only after a hold or at the deadline of a
# command, days later perhaps, that a machine has lost its power. A host agent allows a ping every
# 5 s (host_agent/server.py). gRPC 1.85 goes by the last of these options, which is 60 s by default.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
)
# How much longer this side waits for a Settle than the host agent does. So the host agent's own
# error arrives here, which says more than "deadline exceeded".
_SETTLE_MARGIN_S = 5
# What the QEMU guest agent may take for a few programs (guests/attached/qemu_guest_agent.py).
_GUEST_AGENT_S = 300.0


class HostClient:
    """The client of one host agent. Close it with `aclose`.

    A call that fails raises an error of hintfleet.errors: that of the host agent; TransientError if
    it cannot be reached; OutcomeUnknown if the answer did not arrive before the deadline.
    """

    def __init__(self, address: str, timeouts: Timeouts, tls: Tls | None = None) -> None:
        """Open a channel, without waiting for a connection.

        :raises InvalidInput: the address is not valid; or there is no TLS, and the address is
            neither a unix socket nor on loopback.
        """
        self._address = address
        self._timeouts = timeouts
        # The other end of a unix socket is on this machine.
        options = _OPTIONS if is_unix(address) else (*_OPTIONS, *_KEEPALIVE)
        self._channel = open_aio_channel(address, client_credentials(address, tls), options)
        self._stub: host_pb2_grpc.HostServiceAsyncStub = host_pb2_grpc.HostServiceStub(
            self._channel
        )

    async def aclose(self) -> None:
        """Close the connection. An open Watch ends; then the host agent ends its trial's guests."""
        # None: no grace period. During one, gRPC would wait for the Watch, which does not end by
        # itself.
        await self._channel.close(None)

    async def get_host(self, driver: host_pb2.Driver.ValueType, wait: bool) -> host_pb2.Host:
        """Return the facts of the host, and whether it can run guests of this driver.

        :param wait: wait for a host agent that does not listen yet, up to the deadline.
        """
        request = host_pb2.GetHostRequest(drivers=[driver])
        call = self._stub.GetHost(request, timeout=self._timeouts.connect_s, wait_for_ready=wait)
        return await self._answer(call, "GetHost")

    async def is_silent(self) -> bool:
        """Return whether the host agent cannot be reached, or does not answer before the deadline.

        A machine that loses its power, or its network, closes no connection: a watch of it ends
        only after some 50 s (`_KEEPALIVE`); before that, only the samples stop.
        """
        try:
            await self.get_host(host_pb2.ATTACHED, wait=False)
        except HintfleetError as error:
            return isinstance(error, TransientError | OutcomeUnknown)
        return False

    async def list_domains(self) -> list[host_pb2.Domain]:
        """Return the domains of the host's libvirt, sorted by name, with obstacles to hinting."""
        request = host_pb2.ListDomainsRequest()
        call = self._stub.ListDomains(request, timeout=self._timeouts.connect_s)
        return list((await self._answer(call, "listing domains")).domains)

    async def list_guests(self) -> list[host_pb2.Guest]:
        """Return all guests with their books, which the host agent audits first."""
        request = host_pb2.ListGuestsRequest()
        call = self._stub.ListGuests(request, timeout=self._timeouts.connect_s)
        return list((await self._answer(call, "listing guests")).guests)

    async def attach_guest(
        self, request: host_pb2.AttachGuestRequest
    ) -> host_pb2.AttachGuestResponse:
        """Attach a running domain; return its guest and the configuration for the guest's agent.

        With `dry_run`, attach nothing; return only the domain with its obstacles.
        """
        timeout_s = self._timeouts.create_s + _asking_s(request)
        call = self._stub.AttachGuest(request, timeout=timeout_s)
        return await self._answer(call, f"attaching {request.domain}")

    async def detach_guest(
        self, request: host_pb2.DetachGuestRequest
    ) -> host_pb2.DetachGuestResponse:
        """Detach a guest; return its final books."""
        timeout_s = self._timeouts.destroy_s + _asking_s(request)
        call = self._stub.DetachGuest(request, timeout=timeout_s)
        return await self._answer(call, f"detaching {request.name}")

    async def create_guest(self, request: host_pb2.CreateGuestRequest) -> host_pb2.Guest:
        """Create a guest; return when it can run steps."""
        call = self._stub.CreateGuest(request, timeout=self._timeouts.create_s)
        return await self._answer(call, f"creating guest {request.name}")

    async def run_step(self, request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        """Run one step of the workload on a guest; return when the guest has done the step.

        Its deadline is the timeout of steps, plus the time that a loop lasts or a program may take.
        """
        limit_ms = request.loop.duration_ms or request.run_program.timeout_ms
        timeout_s = self._timeouts.step_s + limit_ms / 1000
        call = self._stub.RunStep(request, timeout=timeout_s)
        return await self._answer(call, f"{request.WhichOneof('step')} on {request.guest_name}")

    async def settle(self, guest_name: str) -> host_pb2.SettleResponse:
        """Have a guest hint all its free memory, and return when that is reclaimed.

        A guest under `reporting` or `balloon` cannot be asked: return when no memory has left it
        for some seconds.
        """
        timeout_s = self._timeouts.settle_s
        request = host_pb2.SettleRequest(guest_name=guest_name, timeout_ms=int(timeout_s * 1000))
        call = self._stub.Settle(request, timeout=timeout_s + _SETTLE_MARGIN_S)
        return await self._answer(call, f"settling {guest_name}")

    async def pause_hinting(self, name: str, for_s: float) -> float:
        """Have a guest hint nothing for a time; 0 ends the pause. Return how long an earlier pause
        would still have lasted, in seconds; 0 if there was none."""
        request = host_pb2.PauseHintingRequest(name=name, for_ms=round(for_s * 1000))
        call = self._stub.PauseHinting(request, timeout=self._timeouts.connect_s)
        return (await self._answer(call, f"pausing {name}")).left_ms / 1000

    async def destroy_guest(
        self, request: host_pb2.DestroyGuestRequest
    ) -> host_pb2.DestroyGuestResponse:
        """End a guest and free all of its memory; return its final books."""
        call = self._stub.DestroyGuest(request, timeout=self._timeouts.destroy_s)
        return await self._answer(call, f"destroying guest {request.name}")

    def watch(self, trial_id: str, period_s: float) -> AsyncGenerator[host_pb2.SampleSet, None]:
        """Yield samples of a trial's guests until the iterator is closed or the stream ends.

        When the trial's last stream has ended, the host agent ends its guests.

        :raises HintfleetError: the stream broke.
        """
        request = host_pb2.WatchRequest(trial_id=trial_id, period_ms=round(period_s * 1000))
        return self._watched(self._stub.Watch(request))

    def watch_host(self, period_s: float) -> AsyncGenerator[host_pb2.SampleSet, None]:
        """Yield samples of all guests of the host until the iterator is closed or the stream
        ends. No guest's life depends on it."""
        request = host_pb2.WatchHostRequest(period_ms=round(period_s * 1000))
        return self._watched(self._stub.WatchHost(request))

    async def _watched(self, call: _SampleCall) -> AsyncGenerator[host_pb2.SampleSet, None]:
        # The only calls without a deadline: the stream lasts as long as the trial.
        try:
            async for samples in call:
                yield samples
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"{self._address}: watching") from error
        finally:
            call.cancel()

    async def _answer(self, call: Awaitable[_Answer], action: str) -> _Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, f"{self._address}: {action}") from error


@asynccontextmanager
async def connected(address: str, tls: Tls | None) -> AsyncIterator[HostClient]:
    """Yield a client of one host agent, with the default deadlines; close it after the block."""
    client = HostClient(address, Timeouts(), tls)
    try:
        yield client
    finally:
        await client.aclose()


def _asking_s(request: host_pb2.AttachGuestRequest | host_pb2.DetachGuestRequest) -> float:
    return _GUEST_AGENT_S if request.through_guest_agent else 0.0

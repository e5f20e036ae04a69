"""The host agent as a whole: two gRPC servers, one registry, one lifetime.

Guests and orchestrators come in by different doors. A guest on user-mode
networking can reach every loopback port of its host, so the control API listens
on a unix socket unless told otherwise, and the door for guests serves nothing
but the guests' own service.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from hintfleet.errors import InvalidInput, Refused
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2_grpc import add_HintingServiceServicer_to_server
from hintfleet.v1.host_pb2_grpc import add_HostServiceServicer_to_server
from host_agent.control_service import ControlService
from host_agent.guest_service import GuestService
from host_agent.guests import GuestDriver
from host_agent.guests.embedded import EmbeddedDriver
from host_agent.guests.libvirt import LibvirtDriver
from host_agent.pressure import Pressure
from host_agent.registry import Registry

_GUEST_LOOPBACK = "10.0.2.2"
"""The host's loopback as a guest on user-mode networking (slirp) sees it."""

_OPTIONS = (
    # A listener that is there already is an error, not a partner.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 1 << 20),
    # Guests ping idle streams every 10 s to notice a lost link.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How this host agent runs.

    :ivar listen: address of the control API: `unix:PATH` or a loopback `HOST:PORT`.
    :ivar guest_listen: loopback `HOST:PORT` at which virtual machines reach the agent.
    """

    name: str
    listen: str
    guest_listen: str
    memory_budget_bytes: int
    libvirt_uri: str


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where a started agent is reached, and its registry."""

    control: str
    guest: str
    registry: Registry


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Serving]:
    """Serve until the block ends; then every guest is destroyed and the sockets closed.

    :raises Refused: an address cannot be bound.
    :raises InvalidInput: an address is not loopback.
    """
    # Abstract: it has no file, so nothing is left behind however this process ends.
    # Anybody on this host can reach it; what counts is a guest's token.
    guest_socket = f"unix-abstract:hintfleet-{os.getpid()}-{secrets.token_hex(8)}"
    guest_server, (_, guest_port) = _make_server([guest_socket, settings.guest_listen])
    control_server, (control_port,) = _make_server([settings.listen])
    registry = Registry(_drivers(guest_socket, guest_port, settings.libvirt_uri))
    control = ControlService(registry, settings.name, settings.memory_budget_bytes)
    add_HintingServiceServicer_to_server(GuestService(registry), guest_server)
    await _add_control(control_server, control)
    await guest_server.start()
    await control_server.start()
    pressure = Pressure(lambda: registry.guests, settings.memory_budget_bytes)
    pressing = asyncio.create_task(pressure.run())
    try:
        yield Serving(
            control=_with_port(settings.listen, control_port),
            guest=_with_port(settings.guest_listen, guest_port),
            registry=registry,
        )
    finally:
        pressing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pressing
        await registry.close()
        await asyncio.gather(control_server.stop(0.1), guest_server.stop(0.1))
        if settings.listen.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                Path(settings.listen.removeprefix("unix:")).unlink()


def _drivers(
    guest_socket: str, guest_port: int, libvirt_uri: str
) -> dict[host_pb2.Driver.ValueType, GuestDriver]:
    return {
        host_pb2.EMBEDDED: EmbeddedDriver(guest_socket),
        host_pb2.LIBVIRT: LibvirtDriver(
            libvirt_uri, guest_server=f"{_GUEST_LOOPBACK}:{guest_port}"
        ),
    }


def _make_server(addresses: Iterable[str]) -> tuple[aio.Server, list[int]]:
    server = aio.server(options=_OPTIONS)
    ports = []
    for address in addresses:
        _check_loopback(address)
        try:
            ports.append(server.add_insecure_port(address))
        except RuntimeError as error:
            raise Refused(
                f"cannot listen on {address}",
                hint="is another host agent running there? choose another --listen address",
            ) from error
    return server, ports


async def _add_control(server: aio.Server, control: ControlService) -> None:
    add_HostServiceServicer_to_server(control, server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [host_pb2.DESCRIPTOR.services_by_name["HostService"].full_name]
    await health.set(names[0], health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (
            *names,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )


def _check_loopback(address: str) -> None:
    host = address.rpartition(":")[0].strip("[]")
    if not address.startswith(("unix:", "unix-abstract:")) and host not in (
        "127.0.0.1",
        "::1",
        "localhost",
    ):
        raise InvalidInput(
            f"{address} is not loopback, and this agent speaks plain text",
            hint="listen on unix:PATH or 127.0.0.1:PORT",
        )


def _with_port(address: str, port: int) -> str:
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"

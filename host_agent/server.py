"""The host agent as a whole: two gRPC servers, one registry, and the loops for pressure, audits,
saving and attaching again. They are started and stopped together.

Guests and orchestrators use different addresses. A guest on user-mode networking can reach
every loopback port of its host. So the control API listens on a unix socket by default, and
the guests' addresses serve the guests' service only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import AF_UNIX, socket

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from hintfleet.errors import InvalidInput, Refused
from hintfleet.logs import fields
from hintfleet.net.addresses import (
    check_address,
    is_unix,
    plain_text_problem,
    socket_path,
)
from hintfleet.net.tls import Tls, listen
from hintfleet.settings import DEFAULT_ORPHAN_AFTER_S, DEFAULT_WATCH_GRACE_S, Driver
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2_grpc import add_HintingServiceServicer_to_server
from hintfleet.v1.host_pb2_grpc import add_HostServiceServicer_to_server
from host_agent.api.adopting import adopt
from host_agent.api.attaching_again import attach_when_started
from host_agent.api.control_service import ControlService
from host_agent.api.grpc_calls import OperatorsOnly
from host_agent.api.guest_service import GuestService
from host_agent.auditor import audit_when_due
from host_agent.budget.budget import Budget
from host_agent.guests.attached.driver import AttachedDriver
from host_agent.guests.driver import GuestDriver, Survival
from host_agent.guests.embedded import EmbeddedDriver
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.persistence.database import Database, opened
from host_agent.pressure.loop import Pressure
from host_agent.registry import Registry
from host_agent.session.guest_address import GuestAddress, open_address, open_lasting_address
from host_agent.threads import in_driver_thread

_log = logging.getLogger("hintfleet.host")

# The host's loopback as a guest on user-mode networking (slirp) sees it.
_GUEST_LOOPBACK = "10.0.2.2"

_OPTIONS = (
    # gRPC's default on Linux is SO_REUSEPORT: a second host agent could bind the same port, and
    # the kernel would give each of them half of the connections.
    ("grpc.so_reuseport", 0),
    # Without probes gRPC keeps the window of a stream at 64 KiB. So a stream that this side does
    # not read takes at most 64 KiB of memory.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.server_handshake_timeout_ms", 5_000),
    # Guests ping idle streams every 10 s to notice a lost link. By default a gRPC server closes a
    # connection with GOAWAY ("Too many pings") if pings arrive more often than every 5 min (gRPC's
    # doc/keepalive.md, GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS).
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_CONTROL_OPTIONS = (*_OPTIONS, ("grpc.max_receive_message_length", 1 << 20))
GUEST_OPTIONS = (
    *_OPTIONS,
    # Enough for a Hello with 100,000 isolated ranges; a batch takes 2 KiB at most.
    ("grpc.max_receive_message_length", 256 << 10),
    # Of each connection. A guest needs two streams at most, and two more while those are ending.
    ("grpc.max_concurrent_streams", 8),
    ("grpc.max_allowed_incoming_connections", 8192),
    ("grpc.max_connection_idle_ms", 60_000),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of this host agent.

    :ivar listen: address of the control API: `unix:PATH` or `HOST:PORT`.
    :ivar guest_listen: `HOST:PORT` at which virtual machines reach the agent.
    :ivar guest_advertise: address that guests are told; empty: derived from where the agent
        listens.
    :ivar enforce_budget: keep the guests of this driver within the budget with a cgroup, where one
        can be made; not with `state`.
    :ivar tls, guest_tls: certificates for TCP at the control API and the guests' address; None
        for plain text, which is allowed on loopback only.
    :ivar state: folder with what guests need to outlive the agent; None: guests end with it.
    :ivar orphan_after_s: with `state`, a guest that was made (not attached) ends by itself when it
        had no host agent for this time.
    :ivar watch_grace_s: adopted guests end if no Watch of their trial is open after this time.
    """

    name: str
    listen: str
    guest_listen: str
    guest_advertise: str = ""
    memory_budget_bytes: int
    enforce_budget: Driver | None = None
    libvirt_uri: str
    tls: Tls | None = None
    guest_tls: Tls | None = None
    state: Path | None = None
    orphan_after_s: int = DEFAULT_ORPHAN_AFTER_S
    watch_grace_s: int = DEFAULT_WATCH_GRACE_S


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The addresses of a started agent, and its registry.

    :ivar failure: gets the error that ended one of the agent's loops. Such an error is a bug: the
        agent must end then.
    """

    control: str
    guest: str
    registry: Registry
    failure: asyncio.Future[None]


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Serving]:
    """Serve until the block ends; then end every guest (detach the attached ones), and close the
    sockets.

    With a state folder, adopt the guests of an earlier host agent before serving; at the end, leave
    the guests as they are: they live on for the next host agent.

    :raises Refused: an address cannot be bound, the state cannot be used, or a guest of an earlier
        host agent can be neither adopted nor found to be gone.
    :raises InvalidInput: an address is not valid, or needs TLS.
    :raises TransientError: the state cannot be written; at the end, all is closed all the same.
    """
    with opened(settings.state) if settings.state else nullcontext() as state:
        async with _serving(settings, state) as served:
            yield served


@asynccontextmanager
async def _serving(settings: Settings, state: Database | None) -> AsyncIterator[Serving]:
    guest_server = aio.server(options=GUEST_OPTIONS)
    guest_address = _open_guest_address(guest_server, settings, state)
    control_server = aio.server(options=_CONTROL_OPTIONS, interceptors=[OperatorsOnly()])
    if socket_file := socket_path(check_address(settings.listen)):
        _refuse_if_taken(socket_file)
    control_address = listen(control_server, settings.listen, settings.tls)
    budget = _budget(settings)
    attached, drivers = _drivers(settings, guest_address, state, budget)
    registry = Registry(drivers, state, attached)
    # Before the servers start: a guest that connected before its adoption would be refused.
    if state is not None:
        await adopt(registry, state.guests(), settings.watch_grace_s)
    control = ControlService(registry, settings.name, budget, attached)
    add_HintingServiceServicer_to_server(GuestService(registry), guest_server)
    await _add_control(control_server, control)
    await guest_server.start()
    await control_server.start()
    pressure = Pressure(lambda: registry.guests, settings.memory_budget_bytes)
    audits = audit_when_due(lambda: registry.guests, registry.observing)
    again = attach_when_started(registry, attached)
    loops = [
        asyncio.create_task(loop) for loop in (pressure.run(), registry.saver.run(), audits, again)
    ]
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for task in loops:
        task.add_done_callback(partial(_tell_failure, failure))
    try:
        yield Serving(
            control=control_address,
            guest=guest_address.address,
            registry=registry,
            failure=failure,
        )
    finally:
        registry.shutting_down = True  # before `end_all`, which would not see a later guest
        for task in loops:
            task.cancel()
        await asyncio.wait(loops)
        if state is None:
            await registry.end_all()
        # This removes the file of a unix socket as well. Nobody may remove it later: by then it may
        # be that of the next host agent.
        await asyncio.gather(control_server.stop(0.1), guest_server.stop(0.1))
        # I2: `leave` waits for punches that run. It must return before the lock of the state is
        # released, because then the next host agent may begin.
        try:
            await registry.leave()
        finally:
            await in_driver_thread(budget.close)
            await registry.close()


def _refuse_if_taken(path: Path) -> None:
    """Check that nobody listens on this unix socket.

    :raises Refused: somebody listens on it, or whether somebody does cannot be found out.
    """
    # Without this check gRPC would replace the socket of another host agent: it unlinks a socket
    # file before it binds, even if another process listens on it
    # (src/core/lib/iomgr/unix_sockets_posix.cc: grpc_unlink_if_unix_domain_socket).
    try:
        with socket(AF_UNIX) as probe:
            probe.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return  # no file, or one that a killed process left
    except OSError as error:
        raise Refused(
            f"cannot listen on unix:{path}: {error.strerror}",
            hint="choose another --listen address",
        ) from error
    raise Refused(
        f"another host agent listens on unix:{path}",
        hint="stop that one, or choose another --listen address",
    )


def _tell_failure(failure: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    """Give `failure` the error that ended a loop, so that the host agent ends: it must not continue
    without audits, allowances or saved books. Do nothing for a cancelled loop."""
    if task.cancelled() or failure.done():
        return
    failure.set_exception(task.exception() or RuntimeError(f"{task.get_name()} has returned"))
    # Mark the error as retrieved: else asyncio may log "exception was never retrieved".
    failure.exception()


def _open_guest_address(
    server: aio.Server, settings: Settings, state: Database | None
) -> GuestAddress:
    if is_unix(settings.guest_listen):
        raise InvalidInput(
            f"--guest-listen {settings.guest_listen!r} is not HOST:PORT, where virtual machines can"
            " reach this agent",
            hint="127.0.0.1:0",
        )
    if state is None:
        return open_address(server, settings.guest_listen, settings.guest_tls)
    earlier = state.guest_address()
    opened_at = open_lasting_address(server, settings.guest_listen, settings.guest_tls, earlier)
    state.set_guest_address(opened_at)
    return opened_at


def _budget(settings: Settings) -> Budget:
    if settings.enforce_budget is None:
        return Budget(limit_bytes=settings.memory_budget_bytes)
    budget = Budget.enforced(settings.memory_budget_bytes, settings.enforce_budget)
    if budget.why_watched:
        about = {"budget_bytes": budget.limit_bytes, "reason": budget.why_watched}
        _log.warning("budget is only watched", extra=fields(**about))
    return budget


def _drivers(
    settings: Settings, guest_address: GuestAddress, state: Database | None, budget: Budget
) -> tuple[AttachedDriver, dict[host_pb2.Driver.ValueType, GuestDriver]]:
    survival = None
    if state is not None:
        survival = Survival(
            folder=state.guests_folder,
            doors=state.doors_folder,
            orphan_after_s=settings.orphan_after_s,
        )
    advertised = settings.guest_advertise
    libvirt = LibvirtDriver(
        settings.libvirt_uri,
        asyncio.get_running_loop(),
        guest_server=advertised or _address_in_guest(guest_address.address),
        guest_tls=settings.guest_tls is not None,
        survival=survival,
        partition=budget.partition,
    )
    embedded = EmbeddedDriver(advertised or guest_address.socket, survival, budget.contain)
    attached = AttachedDriver(
        settings.libvirt_uri,
        asyncio.get_running_loop(),
        guest_server=advertised or _address_in_guest(guest_address.address),
        guest_tls=settings.guest_tls is not None,
        survival=survival,
    )
    return attached, {host_pb2.EMBEDDED: embedded, host_pb2.LIBVIRT: libvirt}


def _address_in_guest(address: str) -> str:
    host, _, port = address.rpartition(":")
    local = not plain_text_problem(address) or host in ("0.0.0.0", "[::]")  # noqa: S104
    return f"{_GUEST_LOOPBACK}:{port}" if local else address


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

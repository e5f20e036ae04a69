"""The agent of an attached guest that waits for its domain, or for its memory door: it is refused
with a status after which it tries again. And a stranger with a long name."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from guest_agent import stream_end
from guest_agent.workload import client
from hintfleet.errors import Refused
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.api import guest_service
from host_agent.api.guest_service import GuestService
from host_agent.guest import Guest
from host_agent.registry import Registry
from tests.support.attached_domain import (
    Booting,
    Driver,
    attached,
    ends_are_dealt_with,
    kept,
    run,
    until,
)


class Refusal(Exception):
    """Raised when the service ends a call with a status."""


class Call:
    """The context of a call without TLS; keeps the status that ends it."""

    code: grpc.StatusCode | None = None
    details = ""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    async def abort(self, code: grpc.StatusCode, details: str = "", *_: object) -> NoReturn:
        self.code, self.details = code, details
        raise Refusal


async def refusals(registry: Registry, guest: Guest) -> list[grpc.StatusCode | None]:
    """Return the statuses with which a session and a workload of this guest are refused."""
    identity = hinting_pb2.Identity(guest_uuid=guest.uuid, token=guest.token)

    async def hello() -> AsyncIterator[hinting_pb2.GuestMessage]:
        said = hinting_pb2.Hello(identity=identity, page_size_bytes=PAGE_BYTES, boot_id="b")
        yield hinting_pb2.GuestMessage(hello=said)

    async def workload() -> AsyncIterator[hinting_pb2.WorkloadEvent]:
        yield hinting_pb2.WorkloadEvent(attach=hinting_pb2.Attach(identity=identity))

    service = GuestService(registry)
    for_session, for_workload = Call(), Call()
    with pytest.raises(Refusal):
        await anext(aiter(service.Session(hello(), for_session)))  # type: ignore[arg-type]
    with pytest.raises(Refusal):
        await anext(aiter(service.Workload(workload(), for_workload)))  # type: ignore[arg-type]
    return [for_session.code, for_workload.code]


TRY_AGAIN = [grpc.StatusCode.UNAVAILABLE] * 2


@pytest.fixture(autouse=True)
def refuse_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_service, "_REFUSAL_S", 0.0)


def test_an_agent_tries_again_when_its_guest_waits() -> None:
    for final in (stream_end._FINAL_CODES, client._FINAL_CODES):
        assert not final & set(TRY_AGAIN)


@pytest.mark.parametrize("close_fails", [None, Refused("libvirt does not answer")])
def test_the_agent_of_a_kept_guest_is_refused_for_now(
    tmp_path: Path, close_fails: Refused | None
) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await attached(registry, driver)
        driver.made[0].close_fails = close_fails
        driver.end()
        await until(lambda: guest.to_attach_again is not None)
        await ends_are_dealt_with(registry)
        assert await refusals(registry, guest) == TRY_AGAIN
        driver.made[0].close_fails = None

    run(scenario, Driver(tmp_path))


def test_an_agent_is_refused_for_now_until_the_door_is_plugged_in(tmp_path: Path) -> None:
    async def scenario(registry: Registry, driver: Any) -> None:
        guest = await kept(registry, driver)
        attempt = asyncio.create_task(registry.attach_again(guest, host_pb2.Ledger()))
        await until(driver.begun.is_set)
        (tried,) = registry.guests
        assert tried is not guest
        assert await refusals(registry, tried) == TRY_AGAIN
        driver.fail.set()
        with pytest.raises(Refused, match="it boots"):
            await attempt

    run(scenario, Booting(tmp_path))


def test_a_long_name_of_a_stranger_is_not_quoted() -> None:
    """It needs no token; to quote 250 KiB would take 20 ms of the event loop, of all guests."""

    async def attach() -> AsyncIterator[hinting_pb2.WorkloadEvent]:
        identity = hinting_pb2.Identity(guest_uuid="\x1b" * 250_000, token="t")
        yield hinting_pb2.WorkloadEvent(attach=hinting_pb2.Attach(identity=identity))

    async def scenario() -> None:
        call = Call()
        with pytest.raises(Refusal):
            await anext(
                aiter(GuestService(Registry({})).Workload(attach(), call))  # type: ignore[arg-type]
            )
        assert call.code is grpc.StatusCode.FAILED_PRECONDITION
        assert len(call.details) < 1000

    asyncio.run(scenario())

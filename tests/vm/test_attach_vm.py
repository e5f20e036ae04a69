"""A domain of somebody else, which runs already, is attached, hinted and detached; after that,
nothing of hintfleet is left in the domain."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.foreign import ForeignDomain, foreign_domain

FREED_MIB = 700
# A Python program that dirties memory page by page, holds it for two seconds, and ends.
DIRTY = (
    f"b = bytearray({FREED_MIB} << 20); b[::4096] = b'1' * (len(b) // 4096);"
    "import time; time.sleep(2)"
)


@pytest.fixture(scope="module")
def foreign(connection: Any, image: GuestImage) -> Iterator[ForeignDomain]:
    with foreign_domain(connection, image) as made:
        yield made


def attach(host: HostAgent, foreign: ForeignDomain) -> host_pb2.AttachGuestResponse:
    request = host_pb2.AttachGuestRequest(domain=foreign.domain.name(), through_guest_agent=True)
    return host.stub.AttachGuest(request, timeout=HANG_S)


def test_a_running_domain_is_attached_hinted_and_detached(foreign: ForeignDomain) -> None:
    name = foreign.domain.name()
    xml, devices = foreign.domain.XMLDesc(), foreign.run("/bin/ls", "/sys/bus/pci/devices")
    with running_host_agent() as host:
        assert attach(host, foreign).guest.name == name
        wait_until(lambda: bool(host.guests()[name].epoch), "its agent")
        with pytest.raises(grpc.RpcError, match="another host agent"):
            attach(host, foreign)

        before = host.guests()[name].ledger
        foreign.run("/usr/bin/python3", "-c", DIRTY)

        def back_bytes() -> int:
            now = host.guests()[name].ledger
            return now.reclaimed_total_bytes - before.reclaimed_total_bytes

        wait_until(lambda: back_bytes() >= 0.95 * FREED_MIB * MIB, "what it freed")

        # The domain's operator resets it. It boots again in the same memory; a new epoch begins.
        epoch = host.guests()[name].epoch
        foreign.domain.reset()
        wait_until(lambda: host.guests()[name].epoch > epoch, "the agent of the next boot")
        foreign.wait_for_boot()

        detach = host_pb2.DetachGuestRequest(name=name, through_guest_agent=True)
        began_s = time.monotonic()
        books = host.stub.DetachGuest(detach, timeout=HANG_S).ledger
        print(f"detached in {time.monotonic() - began_s:.2f} s")
        assert books.provisioned_bytes == (
            books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
        )
        assert name not in host.guests()
    assert foreign.domain.isActive()
    assert foreign.domain.XMLDesc() == xml
    assert foreign.run("/bin/ls", "/sys/bus/pci/devices") == devices
    assert "HugePages_Total:       0" in foreign.run("/bin/cat", "/proc/meminfo")


def test_a_domain_whose_host_agent_ends_is_let_go(foreign: ForeignDomain) -> None:
    xml = foreign.domain.XMLDesc()
    folders = set(Path(tempfile.gettempdir()).glob("hintfleet-guest-*"))
    with running_host_agent() as host:
        attach(host, foreign)
    assert set(Path(tempfile.gettempdir()).glob("hintfleet-guest-*")) <= folders
    assert foreign.domain.isActive()
    assert foreign.domain.XMLDesc() == xml


def test_the_next_host_agent_goes_on_with_it(
    foreign: ForeignDomain, readable_by_qemu: Path
) -> None:
    name, xml = foreign.domain.name(), foreign.domain.XMLDesc()
    state = ("--state", str(readable_by_qemu / "state"))
    with running_host_agent(*state) as host:
        attach(host, foreign)
        wait_until(lambda: bool(host.guests()[name].epoch), "its agent")
        epoch = host.guests()[name].epoch
        host.process.kill()
        host.process.wait()
    with running_host_agent(*state) as host:
        wait_until(lambda: host.guests()[name].epoch > epoch, "its agent again")
        host.settle(name)
        detach = host_pb2.DetachGuestRequest(name=name, through_guest_agent=True)
        host.stub.DetachGuest(detach, timeout=HANG_S)
    assert foreign.domain.XMLDesc() == xml


def test_a_door_that_somebody_takes_out_ends_the_guest(
    foreign: ForeignDomain, connection: Any
) -> None:
    del connection
    name = foreign.domain.name()
    with running_host_agent() as host:
        attach(host, foreign)
        start = foreign.domain.XMLDesc().index("<filesystem")
        end = foreign.domain.XMLDesc().index("</filesystem>") + len("</filesystem>")
        foreign.domain.detachDeviceFlags(foreign.domain.XMLDesc()[start:end])
        wait_until(lambda: name not in host.guests(), "the guest to be forgotten")
        assert foreign.domain.isActive()


def test_a_suspended_domain_is_refused_and_an_ended_one_forgotten(foreign: ForeignDomain) -> None:
    name = foreign.domain.name()
    with running_host_agent() as host:
        foreign.domain.suspend()
        with pytest.raises(grpc.RpcError, match="it is suspended"):
            attach(host, foreign)
        foreign.domain.resume()
        attach(host, foreign)
        foreign.domain.destroy()
        wait_until(lambda: name not in host.guests(), "the guest to be forgotten")

"""A domain of somebody else, which runs already, is attached, hinted and detached; after that, its
XML and devices are as before. Also what happens when its host agent ends or is killed, and when the
domain is suspended or ends.

The host agent runs as an ordinary user in the group libvirt; libvirtd is the tests' own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, HostAgent, running_host_agent, wait_until
from tests.support.foreign import KMOD, ForeignDomain
from tests.support.ordinary_user import USER
from tests.support.own_libvirt import OwnLibvirt

FREED_MIB = 700
# A Python program that dirties memory page by page, holds it for two seconds, and ends.
DIRTY = (
    f"b = bytearray({FREED_MIB} << 20); b[::4096] = b'1' * (len(b) // 4096);"
    "import time; time.sleep(2)"
)


@pytest.fixture
def folder(readable_by_qemu: Path) -> Path:
    """Make a folder that belongs to the host agent's user."""
    os.chown(readable_by_qemu, pwd.getpwnam(USER).pw_uid, -1)
    return readable_by_qemu


@contextlib.contextmanager
def running(libvirt: OwnLibvirt, folder: Path, *arguments: str) -> Iterator[HostAgent]:
    """Run the host agent without root."""
    with running_host_agent(
        *("--libvirt-uri", libvirt.uri, "--listen", f"unix:{folder}/host.sock"),
        *arguments,
        module="tests.support.ordinary_user",
    ) as host:
        yield host


@pytest.fixture
def host(libvirt: OwnLibvirt, folder: Path) -> Iterator[HostAgent]:
    with running(libvirt, folder) as agent:
        yield agent


def attach(
    host: HostAgent, foreign: ForeignDomain, isolator: str = ""
) -> host_pb2.AttachGuestResponse:
    request = host_pb2.AttachGuestRequest(
        domain=foreign.domain.name(),
        hinting=host_pb2.HintingSettings(isolator=isolator),
        through_guest_agent=True,
    )
    return host.stub.AttachGuest(request, timeout=HANG_S)


def detach(host: HostAgent, foreign: ForeignDomain) -> host_pb2.Ledger:
    request = host_pb2.DetachGuestRequest(name=foreign.domain.name(), through_guest_agent=True)
    return host.stub.DetachGuest(request, timeout=HANG_S).ledger


def check_that_freed_memory_comes_back(host: HostAgent, foreign: ForeignDomain) -> None:
    """Wait for the guest's agent; then dirty and free memory, and wait until 95 % of it, less what
    is on the kernel's per-CPU lists, is reclaimed.

    What is on these lists (54 MiB at most in this guest) is not free for anybody: neither isolator
    nor free page reporting can take it.
    """
    name = foreign.domain.name()
    wait_until(lambda: bool(host.guests()[name].epoch), "its agent")
    before = host.guests()[name].ledger
    foreign.run("/usr/bin/python3", "-c", DIRTY)

    def back_bytes() -> int:
        return host.guests()[name].ledger.reclaimed_total_bytes - before.reclaimed_total_bytes

    def is_back() -> bool:
        wanted_bytes = 0.95 * FREED_MIB * MIB
        return back_bytes() >= wanted_bytes or (
            back_bytes() >= wanted_bytes - foreign.per_cpu_bytes()
        )

    wait_until(is_back, "what it freed")


def list_domains(host: HostAgent) -> Sequence[host_pb2.Domain]:
    return host.stub.ListDomains(host_pb2.ListDomainsRequest(), timeout=HANG_S).domains


def test_a_running_domain_is_attached_hinted_and_detached(
    libvirt: OwnLibvirt, folder: Path, host: HostAgent, foreign: ForeignDomain
) -> None:
    name = foreign.domain.name()
    xml, devices = foreign.domain.XMLDesc(), foreign.run("/bin/ls", "/sys/bus/pci/devices")
    assert attach(host, foreign).guest.name == name
    check_that_freed_memory_comes_back(host, foreign)
    with pytest.raises(grpc.RpcError, match="is attached already"):
        attach(host, foreign)
    (found,) = (one for one in list_domains(host) if one.name == name)
    assert found.obstacles[0].what == f"it is attached, as guest {name}"
    with running(libvirt, folder, "--listen", f"unix:{folder}/other.sock") as other:
        (found,) = (one for one in list_domains(other) if one.name == name)
        assert found.obstacles[0].what == "another host agent is attached to it"

    # The operator resets the domain: the guest boots again in the same memory, in a new epoch.
    epoch = host.guests()[name].epoch
    foreign.domain.reset()
    wait_until(lambda: host.guests()[name].epoch > epoch, "the agent of the next boot")
    foreign.wait_for_boot()

    began_s = time.monotonic()
    books = detach(host, foreign)
    print(f"detached in {time.monotonic() - began_s:.2f} s")
    assert books.provisioned_bytes == (
        books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
    )
    assert name not in host.guests()
    assert foreign.domain.isActive()
    assert foreign.domain.XMLDesc() == xml
    assert foreign.run("/bin/ls", "/sys/bus/pci/devices") == devices
    assert "HugePages_Total:       0" in foreign.run("/bin/cat", "/proc/meminfo")


def test_the_kernel_module_hints_in_it_too(host: HostAgent, foreign: ForeignDomain) -> None:
    foreign.run("/sbin/insmod", KMOD)
    attach(host, foreign, "kmod")
    check_that_freed_memory_comes_back(host, foreign)
    detach(host, foreign)
    foreign.run("/sbin/rmmod", "hintfleet_kmod")


def test_what_an_operator_takes_with_the_balloon_is_no_saving(
    host: HostAgent, foreign: ForeignDomain
) -> None:
    """The guest hints nothing here; otherwise the balloon would take what is absent already."""
    name, size_kib = foreign.domain.name(), foreign.domain.maxMemory()
    attach(host, foreign)
    wait_until(lambda: bool(host.guests()[name].epoch), "its agent")
    host.pause_hinting(600, name)
    foreign.run("/usr/bin/python3", "-c", DIRTY)
    before = host.guests()[name].ledger
    foreign.domain.setMemory(size_kib - 400 * 1024)
    wait_until(
        lambda: host.guests()[name].ledger.untouched_bytes > before.untouched_bytes + 300 * MIB,
        "the books to show that the balloon took memory",
    )
    foreign.domain.setMemory(size_kib)
    foreign.run("/usr/bin/python3", "-c", DIRTY)
    wait_until(
        lambda: host.guests()[name].ledger.untouched_bytes < before.untouched_bytes + 100 * MIB,
        "the books to show that it is used again",
    )
    books = detach(host, foreign)
    assert books.reclaimed_total_bytes < before.reclaimed_total_bytes + 50 * MIB
    assert books.provisioned_bytes == (
        books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
    )


def test_a_domain_whose_host_agent_ends_is_let_go(
    libvirt: OwnLibvirt, folder: Path, foreign: ForeignDomain
) -> None:
    xml = foreign.domain.XMLDesc()
    with running(libvirt, folder) as host:
        attach(host, foreign)
        folders = f"hintfleet-guest-{host.process.pid}-*"
        assert list(Path(tempfile.gettempdir()).glob(folders))
    assert not list(Path(tempfile.gettempdir()).glob(folders))
    assert foreign.domain.isActive()
    assert foreign.domain.XMLDesc() == xml


def test_the_next_host_agent_goes_on_with_it(
    libvirt: OwnLibvirt, folder: Path, foreign: ForeignDomain
) -> None:
    name, xml = foreign.domain.name(), foreign.domain.XMLDesc()
    state = ("--state", str(folder / "state"))
    with running(libvirt, folder, *state) as host:
        attach(host, foreign)
        wait_until(lambda: bool(host.guests()[name].epoch), "its agent")
        epoch = host.guests()[name].epoch
        host.process.kill()
        host.process.wait()
    with running(libvirt, folder, *state) as host:
        wait_until(lambda: host.guests()[name].epoch > epoch, "its agent again")
        host.settle(name)
        detach(host, foreign)
    assert foreign.domain.XMLDesc() == xml


def test_a_door_that_a_killed_host_agent_left_is_taken_out(
    libvirt: OwnLibvirt, folder: Path, foreign: ForeignDomain
) -> None:
    name, xml = foreign.domain.name(), foreign.domain.XMLDesc()

    def attached_and_killed() -> None:
        with running(libvirt, folder) as host:
            attach(host, foreign)
            host.process.kill()
            host.process.wait()

    attached_and_killed()
    assert foreign.domain.XMLDesc() != xml
    attached_and_killed()  # this host agent removes the old door, and leaves its own

    def leaks(flag: str) -> list[dict[str, object]]:
        command = [sys.executable, "-m", "host_agent", flag, "--libvirt-uri", libvirt.uri]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S)
        found = json.loads(done.stdout)["leaks"]
        return [leak for leak in found if leak["where"] == f"domain {name}"]

    (leak,) = leaks("--leaks")
    assert leak["what"] == "memory door"
    (leak,) = leaks("--clean")
    assert leak["removed"]
    assert foreign.domain.XMLDesc() == xml


def test_a_door_that_somebody_takes_out_ends_the_guest(
    host: HostAgent, foreign: ForeignDomain
) -> None:
    name = foreign.domain.name()
    attach(host, foreign)
    start = foreign.domain.XMLDesc().index("<filesystem")
    end = foreign.domain.XMLDesc().index("</filesystem>") + len("</filesystem>")
    foreign.domain.detachDeviceFlags(foreign.domain.XMLDesc()[start:end])
    wait_until(lambda: name not in host.guests(), "the guest to be forgotten")
    assert foreign.domain.isActive()


def test_a_domain_that_ends_is_attached_again_when_it_starts(
    host: HostAgent, foreign: ForeignDomain
) -> None:
    name = foreign.domain.name()
    attach(host, foreign)
    check_that_freed_memory_comes_back(host, foreign)
    guest = host.guests()[name]
    foreign.domain.destroy()
    wait_until(
        lambda: "attached again when its domain runs" in host.guests()[name].not_hinting_because,
        "the guest to wait",
    )
    foreign.domain.create()
    wait_until(lambda: host.guests()[name].epoch > guest.epoch, "the agent of the next start")
    earlier = host.guests()[name].earlier
    assert earlier.reclaimed_total_bytes >= guest.ledger.reclaimed_total_bytes > 0
    foreign.wait_for_boot()
    detach(host, foreign)


def test_a_suspended_domain_is_refused_and_one_that_is_removed_is_forgotten(
    host: HostAgent, foreign: ForeignDomain
) -> None:
    name = foreign.domain.name()
    foreign.domain.suspend()
    with pytest.raises(grpc.RpcError, match="it is suspended"):
        attach(host, foreign)
    foreign.domain.resume()
    attach(host, foreign)
    domain = foreign.domain
    domain.undefine()
    domain.destroy()
    wait_until(lambda: name not in host.guests(), "the guest to be forgotten")

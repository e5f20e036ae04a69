"""Hinting works in real guests, through a real host agent: with kmod and hugetlb, after a
suspension, and under pressure. Also a host agent that is killed, and a guest that has free page
reporting on."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX, DomainSpec, Memballoon
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import HANG_S, TRIAL, alive, running_host_agent, wait_until
from tests.support.vm import Guests, console, spec

GUESTS = ("kmod", "hugetlb")
FREED_BYTES = 400 * MIB


@pytest.mark.parametrize("name", GUESTS)
def test_what_is_freed_leaves_the_host(guests: Guests, connection: Any, name: str) -> None:
    host = guests.host
    time.sleep(3)  # long enough for a rest: after ten idle polls, the agent polls once a second
    host.allocate(FREED_BYTES + 60 * MIB, name)
    before_bytes = guests.ledger(name).resident_bytes
    host.free(FREED_BYTES, name)
    guests.falls_to(name, before_bytes - int(0.9 * FREED_BYTES))
    settled = host.settle(name)
    assert settled.ledger.reclaimed_now_bytes > 0.9 * FREED_BYTES
    guests.balances(name, connection)
    assert host.verify(name).wrong_pages == 0


@pytest.mark.parametrize("name", GUESTS)
def test_a_suspended_guest_goes_on_in_a_new_epoch(
    guests: Guests, connection: Any, name: str
) -> None:
    host = guests.host
    host.allocate(FREED_BYTES, name)
    epoch = host.guests()[name].epoch
    domain = connection.lookupByName(NAME_PREFIX + name)
    domain.suspend()
    before_bytes = guests.ledger(name).resident_bytes
    domain.resume()
    host.free(FREED_BYTES, name)
    host.settle(name)
    assert host.guests()[name].epoch > epoch
    guests.falls_to(name, before_bytes - int(0.9 * FREED_BYTES))
    assert host.verify(name).wrong_pages == 0


@pytest.mark.parametrize("name", GUESTS)
def test_memory_used_and_freed_between_two_looks_leaves_nothing_behind(
    guests: Guests, connection: Any, name: str
) -> None:
    host = guests.host
    host.settle(name)
    before = guests.ledger(name)
    for _ in range(4):
        host.allocate(200 * MIB, name)
        host.free(200 * MIB, name)
    after = host.settle(name).ledger
    assert after.resident_bytes < before.resident_bytes + 20 * MIB
    hinted_bytes = after.hinted_total_bytes - before.hinted_total_bytes
    absent_bytes = after.absent_total_bytes - before.absent_total_bytes
    assert hinted_bytes > 150 * MIB
    if name == "hugetlb":  # for kmod, the kernel reports some absent chunks again
        assert absent_bytes < 0.1 * hinted_bytes, "hinted chunks that were not resident"
    guests.balances(name, connection)
    assert host.verify(name).wrong_pages == 0


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_keeps_what_it_uses_again_until_a_settle(
    guests: Guests, connection: Any, name: str
) -> None:
    host = guests.host
    host.settle(name)

    def churned() -> int:
        """Use and free 64 MiB for 8 s, and again if the guest is slow; return how often."""
        churn = {"size_bytes": 64 * MIB, "duration_ms": 8000, "seed": 1}
        cycles = 0
        for _ in range(10):
            cycles += host.loop(hinting_pb2.Loop.CHURN, name, **churn).looped.cycles
            if cycles > 4:
                return cycles
        raise AssertionError(f"only {cycles} cycles")

    churned()  # the guest learns what it uses again; on a busy machine, for some rounds more
    for _ in range(5):
        before = guests.ledger(name)
        cycles = churned()
        after = guests.ledger(name)
        taken_back_bytes = after.refaulted_total_bytes - before.refaulted_total_bytes
        if taken_back_bytes < cycles * 64 * MIB / 4:
            break
    assert taken_back_bytes < cycles * 64 * MIB / 4
    settled = host.settle(name).ledger
    assert settled.resident_bytes < after.resident_bytes - 40 * MIB
    guests.balances(name, connection)


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_whose_hinting_is_paused_keeps_what_it_frees(guests: Guests, name: str) -> None:
    """The kernel would isolate up to 128 MiB for the module every three seconds, for a second."""
    host = guests.host
    host.allocate(FREED_BYTES, name)
    host.pause_hinting(HANG_S, name)
    host.settle(name)  # its answer comes after the agent has read that it is paused
    host.free(FREED_BYTES, name)

    def waiting_bytes() -> int:
        return host.guests()[name].resident_parts.waiting_bytes

    wait_until(lambda: waiting_bytes() > 0.8 * FREED_BYTES, "telemetry of after that")
    free_bytes = []
    for _ in range(40):
        free_bytes.append(host.guests()[name].guest_free_bytes)
        time.sleep(0.25)
    host.pause_hinting(0, name)
    assert min(free_bytes) > max(free_bytes) - 32 * MIB
    assert host.settle(name).ledger.reclaimed_now_bytes > 0.8 * FREED_BYTES


def test_under_pressure_a_guest_gives_what_is_wanted_and_keeps_nothing_back(
    image: GuestImage, libvirt_uri: str
) -> None:
    """The kernel module hands up to 128 MiB to the agent at a time, and takes them back only as a
    whole. So the agent hints all of them, even if its allowance is used up before. After that, a
    Settle must hint nothing more."""
    threshold_bytes, held_bytes = 420 * MIB, 50 * MIB

    def free_bytes() -> int:
        return host.samples[-1].samples[0].guest_free_bytes if host.samples[-1].samples else 0

    with running_host_agent("--memory-budget", "560MiB") as host:
        host.watch()
        asked = spec(memory_bytes=768 * MIB)
        asked.hinting.policy, asked.hinting.pressure_percent = "pressure", 75
        host.stub.CreateGuest(
            host_pb2.CreateGuestRequest(
                command=host_pb2.CommandId(trial_id=TRIAL), name="wanted", spec=asked
            ),
            timeout=HANG_S,
        )
        wait_until(lambda: free_bytes() > 0, "the guest to say what is free")
        free_at_first_bytes = free_bytes()
        host.allocate(held_bytes + FREED_BYTES, "wanted")
        host.free(FREED_BYTES, "wanted")

        def resident_bytes() -> int:
            return host.guests()["wanted"].ledger.resident_bytes

        wait_until(lambda: resident_bytes() <= threshold_bytes, "the excess to come back")
        host.settle("wanted")
        # 150 MiB: the module's 128 MiB, and what the guest stopped using by itself meanwhile.
        assert resident_bytes() > threshold_bytes - 150 * MIB, "and no more than that"
        least_bytes = free_at_first_bytes - held_bytes - 16 * MIB
        wait_until(lambda: free_bytes() > least_bytes, "the guest to have the rest back")


def test_init_on_alloc_off_is_seen(guests: Guests) -> None:
    assert "init_on_alloc=0" in console(guests["hugetlb"].pid)


def test_a_killed_host_agent_leaves_no_domain(connection: Any, libvirt_uri: str) -> None:
    def domains() -> list[Any]:
        return [d for d in connection.listAllDomains() if d.name() == "hintfleet-orphan"]

    with running_host_agent() as host:
        host.watch()
        request = host_pb2.CreateGuestRequest(
            command=host_pb2.CommandId(trial_id=TRIAL), name="orphan", spec=spec()
        )
        errors: list[grpc.RpcError] = []

        def create() -> None:
            try:
                host.stub.CreateGuest(request, timeout=HANG_S)
            except grpc.RpcError as error:
                errors.append(error)

        creating = threading.Thread(target=create)
        creating.start()
        # Kill the host agent at the worst moment: the guest runs, but CreateGuest has not returned.
        wait_until(lambda: bool(domains()), "the domain")
        uuid = domains()[0].UUIDString()

        def qemus() -> list[int]:
            pids = filter(str.isdecimal, os.listdir("/proc"))
            return [int(pid) for pid in pids if uuid in command_line(pid)]

        # libvirt lists the domain a moment before it starts QEMU.
        wait_until(lambda: bool(qemus()), "its QEMU")
        qemu = qemus()
        host.process.send_signal(signal.SIGKILL)
        creating.join(HANG_S)
        assert errors
    wait_until(lambda: not domains(), "the domain to be gone")
    wait_until(lambda: not any(map(alive, qemu)), "QEMU to end")


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


class WithReporting(LibvirtDriver):
    """Makes hinting guests whose balloon has free page reporting on."""

    def _domain_spec(self, *arguments: Any) -> DomainSpec:
        made = super()._domain_spec(*arguments)
        return DomainSpec(**(vars(made) | {"memballoon": Memballoon.REPORTING}))


def test_reporting_that_is_registered_already_is_said(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: object
) -> None:
    driver = WithReporting(libvirt_uri, loop, guest_server="10.0.2.2:9")
    gone: list[str] = []
    guest = driver.create(
        GuestRequest(
            name="busy",
            uuid="5b9d0f0e-0000-4000-8000-00000000b157",
            token="secret",
            spec=spec(memory_bytes=512 * MIB),
            on_gone=gone.append,
        )
    )
    try:
        wait_until(lambda: bool(gone), "the guest to end")
        said = guest.evidence()
    finally:
        guest.close()
        driver.close()
    assert "cannot load hintfleet_kmod" in said
    assert "cannot isolate" in said
    assert "free page reporting on" in said

"""The hugetlb isolator on stock kernels: refusals, peak memory use, the death of an agent."""

import asyncio
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from hintfleet.units import MIB
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt.domain_xml import DomainSpec, domain_xml
from host_agent.guests.libvirt.driver import LibvirtDriver
from tests.support.agents import wait_until
from tests.support.vm import Guests, console, spec

GUESTS = ("dying", "zeroing", "pool-in-use", "overcommit", "zeroes-freed")
FREED_BYTES = 300 * MIB


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pool-in-use", "the hugetlb pool is in use: nr_hugepages is 4"),
        ("overcommit", "nr_overcommit_hugepages is 4"),
        ("zeroes-freed", "init_on_free=1"),
    ],
)
def test_a_guest_where_it_would_be_unsafe_or_vain_is_refused(
    guests: Guests, name: str, said: str
) -> None:
    failure = guests.failure(name)
    assert said in failure
    assert "try: " in failure
    assert "kmod" in failure


VIRTIO_MEM = """
<memory model='virtio-mem' access='shared'>
  <target>
    <size unit='MiB'>128</size>
    <node>0</node>
    <block unit='MiB'>2</block>
    <requested unit='MiB'>0</requested>
  </target>
</memory>
"""


def test_a_guest_with_virtio_mem_is_refused(
    libvirt_uri: str,
    loop: asyncio.AbstractEventLoop,
    image: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guest with CMA is refused for the same reason: it, too, may replace free huge pages
    (alloc_contig_range). Only tests/unit can test that: Debian's cloud kernel is built without
    CONFIG_CMA and ignores `cma=`."""

    def with_virtio_mem(spec: DomainSpec) -> str:
        domain = ET.fromstring(domain_xml(spec))  # noqa: S314 - our own
        devices = domain.find("devices")
        assert devices is not None
        devices.append(ET.fromstring(VIRTIO_MEM))  # noqa: S314 - our own
        return ET.tostring(domain, encoding="unicode")

    monkeypatch.setattr("host_agent.guests.libvirt.driver.domain_xml", with_virtio_mem)
    driver = LibvirtDriver(libvirt_uri, loop, guest_server="10.0.2.2:9")
    gone: list[str] = []
    guest = driver.create(
        GuestRequest(
            name="virtio-mem",
            uuid="5b9d0f0e-0000-4000-8000-00000000b158",
            token="secret",
            spec=spec(isolator="hugetlb", memory_bytes=384 * MIB, max_memory_bytes=512 * MIB),
            on_gone=gone.append,
        )
    )
    try:
        wait_until(lambda: bool(gone), "the guest to end")
        said = guest.evidence()
    finally:
        guest.close()
        driver.close()
    assert "this guest has virtio-mem, which may replace free huge pages" in said
    assert "use the kmod isolator" in said


@pytest.fixture
def said_by_dying_agents(guests: Guests) -> str:
    """Return the console output of a guest in which an agent was killed in the middle of a pass,
    and the next agent was stopped (in_guest/dying_agent.py)."""

    def said() -> str:
        return console(guests["dying"].pid)

    if "PROBE left" not in said():
        guests.host.allocate(FREED_BYTES, "dying")
        guests.host.free(FREED_BYTES, "dying")
        wait_until(lambda: "the agent was stopped" in said(), "two agents to end")
    return said()


def test_what_a_dead_agent_isolated_stays_so_until_the_next_is_welcomed(
    guests: Guests, said_by_dying_agents: str
) -> None:
    said = said_by_dying_agents
    assert "the agent was killed (status 137)" in said
    found = re.search(
        r"PROBE found PoolState\(total=(\d+), free=(\d+), reserved=(\d+), surplus=(\d+)\),"
        r" adopted (\d+)",
        said,
    )
    assert found, said
    total, free, reserved, surplus, adopted = map(int, found.groups())
    assert total == free == reserved == adopted > 0, "somebody could have used them"
    assert surplus == total, "somebody has set nr_hugepages to 0 meanwhile"
    assert "PROBE second agent: another guest agent uses the hugetlb pool" in said
    # After its Welcome, the second agent released what it had found, and has hinted it since.
    assert guests.ledger("dying").hinted_total_bytes >= adopted * 2 * MIB


def test_an_agent_that_is_stopped_gives_back_what_it_has(said_by_dying_agents: str) -> None:
    """The agent waits for the acks of the batches in flight, so that its guest gets that memory
    back."""
    assert "the agent was stopped: starting it again" in said_by_dying_agents
    assert "PROBE left PoolState(total=0, free=0, reserved=0, surplus=0)" in said_by_dying_agents


def test_zeroing_costs_no_more_than_64_mib_at_a_time(guests: Guests, connection: Any) -> None:
    host = guests.host
    assert "init_on_alloc=1" in console(guests["zeroing"].pid)
    host.settle("zeroing")
    at_first_bytes = guests.ledger("zeroing").resident_bytes
    host.allocate(FREED_BYTES, "zeroing")
    highest_bytes = max(guests.ledger("zeroing").resident_bytes, at_first_bytes + FREED_BYTES)
    seen_before = len(host.samples)
    host.free(FREED_BYTES, "zeroing")
    # At least two thirds come back, not nearly all: a guest that has just booted goes on reading
    # files; and the isolator leaves the kernel a reserve, which was absent at first, and is
    # resident once the workload has used it.
    guests.falls_to("zeroing", at_first_bytes + FREED_BYTES // 3)
    spike_bytes = max(
        sample.ledger.resident_bytes - highest_bytes
        for samples in host.samples[seen_before:]
        for sample in samples.samples
        if sample.guest_name == "zeroing"
    )
    assert spike_bytes <= 64 * MIB
    host.settle("zeroing")
    guests.balances("zeroing", connection)

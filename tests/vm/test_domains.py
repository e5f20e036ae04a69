"""ListDomains reports what keeps domains of somebody else from being hinted, and does not change
the domains. Encrypted memory is not tested here: libvirt defines such a domain only on a machine
with SEV.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, running_host_agent

libvirt = pytest.importorskip("libvirt")

SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
PORTS = "<controller type='pci' index='0' model='pcie-root'/>" + "".join(
    f"<controller type='pci' index='{index}' model='pcie-root-port'/>" for index in range(1, 5)
)


HUGE_AND_LOCKED = ("hugepages", "locked")
NO_BALLOON = "<memballoon model='none'/>"
REPORTING = "<memballoon model='virtio' freePageReporting='on'/>"
# The only port is taken. Without the line `usb`, libvirt adds a USB controller, and a port for it.
NO_FREE_PORT = (
    "<controller type='usb' model='none'/><controller type='pci' index='0' model='pcie-root'/>"
    "<controller type='pci' index='1' model='pcie-root-port'/>"
    "<interface type='user'><model type='virtio'/>"
    "<address type='pci' domain='0' bus='1' slot='0' function='0'/></interface>"
)
ASSIGNED = (
    "<hostdev mode='subsystem' type='pci' managed='no'>"
    "<source><address domain='0' bus='0' slot='0x1f' function='0'/></source></hostdev>"
)
LIMIT = "<memtune><hard_limit unit='MiB'>512</hard_limit></memtune>"


def xml(backing: str, devices: str) -> str:
    identity = uuid.uuid4()
    return (
        f"<domain type='qemu'><name>db-{identity.hex[:8]}</name><uuid>{identity}</uuid>"
        f"<memory unit='MiB'>256</memory>{backing}<vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices>{devices}</devices></domain>"
    )


@contextmanager
def running_domain(connection: Any, backing: str, devices: str) -> Iterator[Any]:
    domain = connection.createXML(xml(backing, devices), libvirt.VIR_DOMAIN_START_AUTODESTROY)
    try:
        yield domain
    finally:
        domain.destroy()


@contextmanager
def shut_off_domain(connection: Any, backing: str, devices: str) -> Iterator[Any]:
    """Define a domain, and do not start it: this machine may be unable to start it."""
    domain = connection.defineXML(xml(backing, devices))
    try:
        yield domain
    finally:
        domain.undefine()


def found_in(*domains: Any) -> list[list[str]]:
    """Return the obstacles that a host agent reports of each of these domains."""
    with running_host_agent() as host:
        answer = host.stub.ListDomains(host_pb2.ListDomainsRequest(), timeout=HANG_S)
    found = {domain.uuid: domain for domain in answer.domains}
    for domain in domains:
        assert found[domain.UUIDString()].running == domain.isActive()
    return [[one.what for one in found[d.UUIDString()].obstacles] for d in domains]


def test_each_running_domain_is_told_what_is_in_the_way(connection: Any) -> None:
    with (
        running_domain(connection, SHARED, PORTS + NO_BALLOON) as ready,
        running_domain(connection, SHARED.replace("shared", "private"), PORTS + NO_BALLOON) as own,
        running_domain(connection, SHARED, PORTS + REPORTING) as taken,
        running_domain(connection, SHARED, NO_FREE_PORT + NO_BALLOON) as full,
        running_domain(connection, SHARED, PORTS + NO_BALLOON) as suspended,
    ):
        suspended.suspend()
        before = ready.XMLDesc()
        assert found_in(ready, suspended, own, full, taken) == [
            [],
            ["it is suspended"],
            ["its memory is not in a shared memfd"],
            ["it has no free PCIe port"],
            ["its balloon has free page reporting on, and a kernel has room for one reporter"],
        ]
        assert ready.XMLDesc() == before


def test_each_domain_that_is_shut_off_too(connection: Any) -> None:
    huge, locked = (SHARED.replace("<source", f"<{what}/><source") for what in HUGE_AND_LOCKED)
    with (
        shut_off_domain(connection, huge, PORTS + NO_BALLOON) as in_huge_pages,
        shut_off_domain(connection, LIMIT + locked, PORTS + NO_BALLOON) as in_locked_memory,
        shut_off_domain(connection, SHARED, PORTS + NO_BALLOON + ASSIGNED) as with_device,
    ):
        assert found_in(in_huge_pages, in_locked_memory, with_device) == [
            ["its memory is in huge pages, which cannot be dropped in part", "it does not run"],
            ["its memory is locked", "it does not run"],
            [
                "a device is assigned to it (VFIO), which goes on writing to memory that was"
                " dropped",
                "it does not run",
            ],
        ]

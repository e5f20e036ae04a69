"""ListDomains reports what keeps domains of somebody else from being hinted, and does not change
the domains."""

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


@contextmanager
def foreign_domain(connection: Any, backing: str, devices: str) -> Iterator[Any]:
    identity = uuid.uuid4()
    domain = connection.createXML(
        f"<domain type='qemu'><name>db-{identity.hex[:8]}</name><uuid>{identity}</uuid>"
        f"<memory unit='MiB'>256</memory>{backing}<vcpu>1</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices>{PORTS}{devices}</devices></domain>",
        libvirt.VIR_DOMAIN_START_AUTODESTROY,
    )
    try:
        yield domain
    finally:
        domain.destroy()


def test_each_domain_is_told_what_is_in_the_way(connection: Any) -> None:
    none = "<memballoon model='none'/>"
    reporting = "<memballoon model='virtio' freePageReporting='on'/>"
    with (
        foreign_domain(connection, SHARED, none) as ready,
        foreign_domain(connection, SHARED.replace("shared", "private"), none) as private,
        foreign_domain(connection, SHARED, reporting) as taken,
        foreign_domain(connection, SHARED, none) as suspended,
        running_host_agent() as host,
    ):
        suspended.suspend()
        before = ready.XMLDesc()
        answer = host.stub.ListDomains(host_pb2.ListDomainsRequest(), timeout=HANG_S)
        found = {domain.uuid: domain for domain in answer.domains}
        assert ready.XMLDesc() == before

        def said(domain: Any) -> list[str]:
            assert found[domain.UUIDString()].running
            return [one.what for one in found[domain.UUIDString()].obstacles]

        assert said(ready) == []
        assert said(suspended) == ["it is suspended"]
        assert said(private) == ["its memory is not in a shared memfd"]
        (reporter,) = said(taken)
        assert "one reporter" in reporter

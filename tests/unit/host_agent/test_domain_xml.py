"""The domain of a guest: what hinting depends on is in its XML."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from hintfleet.units import GIB
from host_agent.guests.domain_xml import CONFIG_ENTRY, DomainSpec, Memballoon, domain_xml
from host_agent.guests.image import GuestImage

SPEC = DomainSpec(
    name="g1",
    uuid="3e1b4b5e-6b1f-4c6e-9f0c-000000000001",
    accelerator="qemu",
    memory_bytes=GIB,
    image=GuestImage(directory=Path("/images/<1>"), kernel_release="6.1.0"),
    console=Path("/run/g1/console.log"),
    config=Path("/run/g1/config.json"),
    parameters=("hintfleet.isolator=kmod", "hintfleet.order=9"),
)


def domain(spec: DomainSpec = SPEC) -> ET.Element:
    return ET.fromstring(domain_xml(spec))  # noqa: S314 - our own


def attribute(element: ET.Element, path: str, name: str) -> str | None:
    found = element.find(path)
    assert found is not None, path
    return found.get(name)


def test_ram_is_a_shared_memfd_of_the_size_asked_for() -> None:
    made = domain()
    assert attribute(made, "memoryBacking/source", "type") == "memfd"
    assert attribute(made, "memoryBacking/access", "mode") == "shared"
    assert made.findtext("memory") == str(GIB)
    assert attribute(made, "memory", "unit") == "bytes"


def test_nothing_else_reports_free_pages() -> None:
    assert attribute(domain(), "devices/memballoon", "model") == "none"


def test_the_peers_have_a_balloon() -> None:
    reporting = domain(replace(SPEC, memballoon=Memballoon.REPORTING)).find("devices/memballoon")
    assert reporting is not None
    assert reporting.attrib == {"model": "virtio", "freePageReporting": "on"}
    target = domain(replace(SPEC, memballoon=Memballoon.TARGET)).find("devices/memballoon")
    assert target is not None
    assert target.attrib == {"model": "virtio", "autodeflate": "on"}
    assert attribute(target, "stats", "period") == "1"


@pytest.mark.parametrize("event", ["on_poweroff", "on_reboot", "on_crash"])
def test_a_guest_that_ends_is_gone(event: str) -> None:
    assert domain().findtext(event) == "destroy"


def test_the_root_disk_is_shared_and_stays_as_it_is() -> None:
    disk = domain().find("devices/disk")
    assert disk is not None
    assert disk.find("readonly") is not None
    assert attribute(disk, "source", "file") == "/images/<1>/root.img"
    assert attribute(disk, "source/seclabel", "relabel") == "no"


def test_the_configuration_is_a_file() -> None:
    entry = domain().find("sysinfo[@type='fwcfg']/entry")
    assert entry is not None
    assert entry.attrib == {"name": CONFIG_ENTRY, "file": "/run/g1/config.json"}
    assert not (entry.text or "").strip()
    assert domain(replace(SPEC, config=None)).find("sysinfo") is None


def test_the_kernel_gets_the_parameters() -> None:
    line = domain().findtext("os/cmdline") or ""
    assert line.split() == [
        *("console=ttyS0", "quiet", "panic=-1"),
        *("hintfleet.isolator=kmod", "hintfleet.order=9"),
    ]


def test_kvm_and_tcg() -> None:
    assert domain().get("type") == "qemu"
    assert domain().find("cpu") is None
    under_kvm = domain(replace(SPEC, accelerator="kvm"))
    assert under_kvm.get("type") == "kvm"
    assert attribute(under_kvm, "cpu", "mode") == "host-passthrough"

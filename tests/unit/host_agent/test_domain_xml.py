"""The XML of a guest's domain has what hinting and its peers depend on."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from hintfleet.agent_config import FW_CFG_NAME
from hintfleet.units import GIB, MIB
from host_agent.guests.libvirt.domain_xml import DomainSpec, Memballoon, domain_xml
from host_agent.guests.libvirt.image import GuestImage

SPEC = DomainSpec(
    name="g1",
    uuid="3e1b4b5e-6b1f-4c6e-9f0c-000000000001",
    accelerator="qemu",
    memory_bytes=GIB,
    image=GuestImage(directory=Path("/images/<1>"), kernel_release="6.1.0"),
    console=Path("/run/g1/console.log"),
    config=Path("/run/g1/config.json"),
    door=Path("/run/g1/door.sock"),
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


def test_a_guest_of_fixed_size_has_no_slots() -> None:
    assert domain().find("maxMemory") is None
    assert domain().find("cpu") is None


def test_a_guest_that_can_grow_has_slots_and_a_node_for_dimms() -> None:
    made = domain(replace(SPEC, max_memory_bytes=2 * GIB))
    assert made.findtext("maxMemory") == str(2 * GIB)
    assert int(attribute(made, "maxMemory", "slots") or 0) > 1
    (cell,) = made.iterfind("cpu/numa/cell")
    assert cell.attrib == {"id": "0", "memory": str(GIB // 1024), "unit": "KiB", "cpus": "0-0"}
    assert "swiotlb=noforce" in (made.findtext("os/cmdline") or "")


def test_memory_is_spread_over_the_nodes() -> None:
    made = domain(replace(SPEC, node_count=3, accelerator="kvm"))
    cells = list(made.iterfind("cpu[@mode='host-passthrough']/numa/cell"))
    sizes = [int(cell.attrib["memory"]) * 1024 for cell in cells]
    assert sum(sizes) == GIB
    assert max(sizes) - min(sizes) <= 2 * MIB
    assert [cell.get("cpus") for cell in cells] == ["0-0", None, None]


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
    assert entry.attrib == {"name": FW_CFG_NAME, "file": "/run/g1/config.json"}
    assert not (entry.text or "").strip()
    assert domain(replace(SPEC, config=None)).find("sysinfo") is None


def test_the_kernel_gets_the_parameters() -> None:
    line = domain().findtext("os/cmdline") or ""
    assert line.split() == [
        *("console=ttyS0", "quiet", "panic=-1", "no_timer_check"),
        *("hintfleet.isolator=kmod", "hintfleet.order=9"),
    ]


def test_kvm_and_tcg() -> None:
    assert domain().get("type") == "qemu"
    assert domain().find("cpu") is None
    under_kvm = domain(replace(SPEC, accelerator="kvm"))
    assert under_kvm.get("type") == "kvm"
    assert attribute(under_kvm, "cpu", "mode") == "host-passthrough"

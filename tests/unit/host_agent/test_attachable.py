"""The obstacles to hinting somebody else's domain: what its XML has or lacks, another host agent
at its memory door, and a domain that is suspended or does not run."""

import socket
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path

import pytest

from host_agent.guests.attached.obstacles import obstacles

BACKING = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
PORTS = (
    "<controller type='pci' index='0' model='pcie-root'/>"
    "<controller type='pci' index='1' model='pcie-root-port'>"
    "<address type='pci' bus='0x00' slot='0x01'/></controller>"
    "<controller type='pci' index='2' model='pcie-root-port'>"
    "<address type='pci' bus='0x00' slot='0x02'/></controller>"
)
DISK = "<disk type='file'><address type='pci' bus='0x01' slot='0x00'/></disk>"


def domain(
    *, name: str = "db1", backing: str = BACKING, more: str = "", devices: str = PORTS + DISK
) -> str:
    inside = f"<name>{name}</name>{backing}{more}<devices>{devices}</devices>"
    xml = f"<domain type='kvm'>{inside}</domain>"
    assert ET.fromstring(xml) is not None  # noqa: S314 - our own
    return xml


def said(xml: str, *, is_running: bool = True) -> list[str]:
    found = obstacles(xml, is_running=is_running)
    assert all(one.change for one in found), "each says what to change"
    return [one.what for one in found]


def test_a_domain_with_shared_memory_and_a_free_port_can_be_hinted() -> None:
    assert said(domain()) == []


def test_a_domain_without_pcie_needs_no_port() -> None:
    assert said(domain(devices="<controller type='pci' index='0' model='pci-root'/>")) == []


@pytest.mark.parametrize(
    ("backing", "more", "devices", "what"),
    [
        ("", "", "", "not in a shared memfd"),
        ("<memoryBacking><source type='memfd'/></memoryBacking>", "", "", "not in a shared memfd"),
        (BACKING.replace("shared", "private"), "", "", "not in a shared memfd"),
        (BACKING.replace("memfd", "file"), "", "", "not in a shared memfd"),
        (
            BACKING,
            "<cpu><numa><cell id='0'/><cell id='1' memAccess='private'/></numa></cpu>",
            "",
            "not in a shared memfd",
        ),
        (BACKING, "", "<memory model='dimm' access='private'/>", "not in a shared memfd"),
        (
            BACKING,
            "<cpu><numa><cell id='0' memAccess='shared'/></numa></cpu>",
            "<memory model='dimm' access='private'><target><node>0</node></target></memory>",
            "not in a shared memfd",
        ),
        (BACKING.replace("<source", "<hugepages/><source"), "", "", "huge pages"),
        (
            BACKING,
            "",
            "<memory model='dimm'><source><pagesize unit='KiB'>2048</pagesize></source></memory>",
            "a DIMM is in huge pages",
        ),
        (BACKING.replace("<source", "<locked/><source"), "", "", "locked"),
        (BACKING, "<launchSecurity type='sev'/>", "", "encrypted"),
        (BACKING, "", "<hostdev mode='subsystem' type='pci'/>", "VFIO"),
        (BACKING, "", "<hostdev mode='subsystem' type='mdev'/>", "VFIO"),
        (BACKING, "", "<interface type='hostdev'/>", "VFIO"),
        (BACKING, "", "<memballoon model='virtio' freePageReporting='on'/>", "one reporter"),
        (
            BACKING,
            "",
            "<interface type='user'><address type='pci' bus='0x02' slot='0x00'/></interface>",
            "no free PCIe port",
        ),
    ],
)
def test_each_obstacle_is_said_alone(backing: str, more: str, devices: str, what: str) -> None:
    (found,) = said(domain(backing=backing, more=more, devices=PORTS + DISK + devices))
    assert what in found


def test_a_domain_whose_cells_are_shared_one_by_one() -> None:
    backing = "<memoryBacking><source type='memfd'/></memoryBacking>"
    cells = "<cpu><numa><cell id='0' memAccess='shared'/></numa></cpu>"
    assert said(domain(backing=backing, more=cells)) == []
    dimm = "<memory model='dimm'><target><node>0</node></target></memory>"
    assert said(domain(backing=backing, more=cells, devices=PORTS + DISK + dimm)) == []


def door_at(path: Path) -> str:
    """Return the XML of a memory door with its socket at `path`, in the only free port of
    `domain()`."""
    return (
        f"<filesystem><source socket='{path}'/><target dir='hintfleet'/>"
        "<address type='pci' bus='0x02' slot='0x00'/></filesystem>"
    )


def test_a_domain_that_is_attached_is_not_attached_again(tmp_path: Path) -> None:
    path = tmp_path / "a door"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()
        assert "another host agent is attached to it" in said(
            domain(devices=PORTS + DISK + door_at(path))
        )
        listener.setblocking(False)
        # Nobody has connected to the door: a connection could end the guest.
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_door_that_a_killed_host_agent_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(left))
    for path in (left, tmp_path / "removed"):
        assert said(domain(devices=PORTS + DISK + door_at(path))) == []


def test_a_domain_that_does_not_run_is_told_how_to_start() -> None:
    (found,) = obstacles(domain(name="db 1"), is_running=False)
    assert found.change == "virsh start 'db 1'"


def test_a_suspended_domain_could_not_open_the_door() -> None:
    (found,) = obstacles(domain(), is_running=True, is_suspended=True)
    assert (found.what, found.change) == ("it is suspended", "virsh resume db1")


def test_a_domain_of_a_host_agent_has_one_row() -> None:
    (found,) = said(domain(name="hintfleet-g0", backing=""))
    assert "a host agent made it" in found

"""Which of libvirt's calls on a domain occur in the files that work on somebody else's domain: none
that ends, suspends, resets or resizes it."""

import ast
from pathlib import Path

import pytest

libvirt = pytest.importorskip("libvirt")

ROOT = Path(__file__).parents[3]
FILES = (
    *sorted((ROOT / "host_agent/guests/attached").glob("*.py")),
    ROOT / "host_agent/guests/libvirt/devices.py",
    ROOT / "host_agent/api/attaching.py",
    ROOT / "host_agent/api/attaching_again.py",
)
ALLOWED = {
    # These only read.
    *("ID", "UUIDString", "XMLDesc", "connect", "isActive", "maxMemory", "name", "state"),
    *("attachDeviceFlags", "detachDeviceFlags"),  # plug and unplug the memory door's device
}


def test_only_these_calls_are_made_on_an_attached_domain() -> None:
    of_a_domain = {name for name in dir(libvirt.virDomain) if not name.startswith("_")}
    made = {
        node.attr
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert made & of_a_domain <= ALLOWED
    assert "detachDeviceFlags" in made

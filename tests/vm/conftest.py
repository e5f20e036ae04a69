"""Real guests: libvirt, the guest image and a driver.

Where one of them cannot be had, the tests are skipped with the reason, or fail
if HINTFLEET_REQUIRE_VM=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from host_agent.guests.image import GuestImage, find_image
from host_agent.guests.libvirt import LibvirtDriver

ROOT = Path(__file__).parents[2]
URI = os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system")


def cannot_be_had(what: str) -> NoReturn:
    if os.environ.get("HINTFLEET_REQUIRE_VM") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def libvirt_uri() -> str:
    """A libvirt that answers; started by hand if this is root and nobody else did."""
    pytest.importorskip("libvirt")
    if URI == "qemu:///system" and os.geteuid() == 0:
        started = subprocess.run([ROOT / "deploy/start-libvirt"], capture_output=True, text=True)
        if started.returncode:
            cannot_be_had(f"libvirt: {started.stderr.strip()}")
    return URI


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """This tree's guest image, built if need be."""
    built = subprocess.run(
        [sys.executable, ROOT / "deploy/image/build.py"], capture_output=True, text=True
    )
    if built.returncode:
        cannot_be_had(built.stderr.strip())
    return find_image()


@pytest.fixture
def driver(libvirt_uri: str, image: GuestImage) -> Iterator[LibvirtDriver]:
    """A driver whose guests find no host agent."""
    made = LibvirtDriver(libvirt_uri, guest_server="10.0.2.2:9", images=image.directory.parent)
    state = made.state()
    if not state.usable:
        cannot_be_had(state.detail)
    yield made
    made.close()

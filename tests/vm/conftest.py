"""Fixtures for real guests: libvirt, the guest image, a driver, and guests that the tests of a
module share.

If libvirt or the image cannot be had, or the driver cannot be used, the tests are skipped with the
reason; with HINTFLEET_REQUIRE_VM=1, they fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hintfleet.errors import Refused
from hintfleet.units import GIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.api import modules
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import GuestImage, find_image
from tests.support.agents import running_host_agent
from tests.support.foreign import ForeignDomain, foreign_domain
from tests.support.loops import running_loop
from tests.support.own_libvirt import OwnLibvirt, own_libvirt
from tests.support.vm import Guests, image_with, nodes_spec, spec

ROOT = Path(__file__).parents[2]
URI = os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system")


def cannot_be_had(what: str) -> NoReturn:
    if os.environ.get("HINTFLEET_REQUIRE_VM") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def libvirt_uri() -> str:
    """Return the URI of libvirt. Start the system's libvirt if it is used, does not answer, and
    this user is root."""
    try:
        libvirt, _ = modules()
    except Refused as error:
        cannot_be_had(error.message)
    if URI == "qemu:///system" and os.geteuid() == 0:
        started = subprocess.run([ROOT / "deploy/start-libvirt"], capture_output=True, text=True)
        if started.returncode:
            cannot_be_had(f"libvirt: {started.stderr.strip()}")
    try:
        libvirt.open(URI).close()
    except libvirt.libvirtError as error:
        cannot_be_had(f"libvirt at {URI}: {error}")
    return URI


@pytest.fixture(scope="session")
def may_have_own_libvirt() -> None:
    """Skip the tests, or fail them, if there can be no libvirtd of their own: it needs root and a
    mount namespace (tests/support/own_libvirt.py)."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        cannot_be_had("no libvirtd of the tests' own: it needs root and a mount namespace")


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """Return this tree's guest image; build it if it is not cached."""
    built = subprocess.run(
        [sys.executable, ROOT / "deploy/image/build.py"], capture_output=True, text=True
    )
    if built.returncode:
        cannot_be_had(built.stderr.strip())
    return find_image()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop, which serves the memory doors of guests that a driver makes."""
    with running_loop() as made:
        yield made


@pytest.fixture
def driver(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: GuestImage
) -> Iterator[LibvirtDriver]:
    """Make a driver. Nobody listens at the address at which its guests look for a host agent."""
    images = image.directory.parent
    made = LibvirtDriver(libvirt_uri, loop, guest_server="10.0.2.2:9", images=images)
    state = made.state()
    if not state.usable:
        cannot_be_had(state.detail)
    yield made
    made.close()


@pytest.fixture
def readable_by_qemu() -> Iterator[Path]:
    """Make a directory that QEMU's user can enter, unlike pytest's tmp_path."""
    directory = Path(tempfile.mkdtemp(prefix="hf-vm-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def connection(libvirt_uri: str) -> Iterator[Any]:
    """Open a connection to libvirt for the tests themselves, one for all of them."""
    libvirt, _ = modules()
    opened = libvirt.open(libvirt_uri)
    yield opened
    assert opened.isAlive(), "libvirtd closed the connection: keepalives were not answered"
    opened.close()


SPECS = {
    "kmod": spec(max_memory_bytes=GIB + 512 * MIB),
    "hugetlb": spec(
        isolator="hugetlb",
        parameters="init_on_alloc=0",
        max_memory_bytes=GIB + 512 * MIB,
    ),
    "dying": spec(
        isolator="hugetlb",
        parameters="init_on_alloc=0 hintfleet.test=die",
        memory_bytes=512 * MIB,
    ),
    "zeroing": spec(
        isolator="hugetlb",
        parameters="init_on_alloc=1 hintfleet.test=no-eject",
        memory_bytes=640 * MIB,
        max_memory_bytes=768 * MIB,
    ),
    "reporting": spec(host_pb2.REPORTING, max_memory_bytes=GIB + 512 * MIB),
    # The balloon grows in steps of half the memory: no test is about its slow default.
    "balloon": spec(host_pb2.BALLOON, balloon=host_pb2.BalloonSettings(step_percent=50)),
    "nodes-kmod": nodes_spec("kmod"),
    "nodes-hugetlb": nodes_spec("hugetlb", "init_on_alloc=0"),
    "pool-in-use": spec(isolator="hugetlb", parameters="hugepages=4", memory_bytes=384 * MIB),
    "zeroes-freed": spec(isolator="hugetlb", parameters="init_on_free=1", memory_bytes=384 * MIB),
    "overcommit": spec(
        isolator="hugetlb",
        parameters="sysctl.vm.nr_overcommit_hugepages=4",
        memory_bytes=384 * MIB,
    ),
}


@pytest.fixture(scope="module")
def guests(request: pytest.FixtureRequest, libvirt_uri: str, image: GuestImage) -> Iterator[Guests]:
    """Run a host agent with the guests of SPECS that the test module names in GUESTS. All tests of
    the module share these guests.

    The guests are ended after the module's tests, because under TCG an idle guest takes CPU time
    from all others.
    """
    specs = {name: SPECS[name] for name in request.module.GUESTS}
    folder = Path(tempfile.mkdtemp(prefix="hf-vm-"))
    folder.chmod(0o755)
    probe = {"hintfleet/sitecustomize.py": Path(__file__).parent / "in_guest/dying_agent.py"}
    images = image_with(image, probe, folder)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HINTFLEET_IMAGE_DIR", str(images))
            host = undo.enter_context(running_host_agent())
        host.watch()
        made = Guests(host, specs)
        made.wait()
        yield made


@pytest.fixture(scope="module")
def libvirt(may_have_own_libvirt: None) -> Iterator[OwnLibvirt]:
    """Run a libvirtd of this module's own."""
    with own_libvirt() as made:
        yield made


@pytest.fixture(scope="module")
def foreign(libvirt: OwnLibvirt, image: GuestImage) -> Iterator[ForeignDomain]:
    """Start a domain of somebody else under this libvirtd; wait until its guest has booted."""
    with foreign_domain(libvirt, image) as made:
        made.wait_for_boot()
        yield made

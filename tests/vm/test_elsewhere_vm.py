"""Machines unlike ours: folders that QEMU's user cannot enter, and guests whose balloon drivers
are missing or do not answer."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.errors import Refused
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest, Survival
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import running_host_agent
from tests.support.lab import Lab, made_lab, result
from tests.support.vm import Guests, spec

SPEC = """\
name: small-vm
driver: libvirt
hosts: {count: 1, memory: 1GiB}
guests: {per_host: 1, memory: 384MiB}
workload: {phases: [{allocate: 64MiB, for: 500ms}]}
repetitions: 1
arms:
  - {name: none, method: none}
"""
NO_BALLOON = "kernel_parameters: module_blacklist=virtio_balloon"


@pytest.fixture
def lab(tmp_path: Path, libvirt_uri: str, image: GuestImage) -> Iterator[Lab]:
    """Make a lab whose temporary folder only this user can enter, like those of libpam-tmpdir."""
    with made_lab(tmp_path) as made:
        assert made.temporary.stat().st_mode & 0o777 == 0o700
        yield made


@pytest.fixture
def private(libvirt_uri: str) -> Iterator[Path]:
    """Make a folder that only this user can enter; skip if QEMU runs as this user."""
    if "system" not in libvirt_uri:
        pytest.skip("QEMU runs as this user here")
    with tempfile.TemporaryDirectory(prefix="hf-vm-") as folder:
        yield Path(folder)


def a_request() -> GuestRequest:
    identity = uuid.uuid4()
    return GuestRequest(
        name=f"test-{identity.hex[:8]}",
        uuid=str(identity),
        token="t",
        spec=host_pb2.GuestSpec(
            driver=host_pb2.LIBVIRT, memory_bytes=384 * MIB, method=host_pb2.NONE
        ),
        on_gone=lambda _: None,
    )


def left_folders() -> set[Path]:
    """Return the folders of guests whose host agent has ended. A folder's name has the process id
    of its host agent."""
    folders = Path("/tmp").glob("hintfleet-guest-*")  # noqa: S108
    return {one for one in folders if not Path("/proc", one.name.split("-")[2]).exists()}


def test_a_temporary_folder_that_qemu_may_not_enter(lab: Lab) -> None:
    before = left_folders()
    data = result(lab.run("run", lab.spec(SPEC), "-o", "json"))
    assert data["state"] == "done"
    assert left_folders() <= before
    lab.check_nothing_is_left()


def test_an_image_that_qemu_may_not_reach(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: GuestImage, private: Path
) -> None:
    copy = Path(shutil.copytree(image.directory, private / "home/cache/one"))
    (private / "home/cache/current").symlink_to(copy)
    private.chmod(0o755)
    (private / "home").chmod(0o700)
    refused(LibvirtDriver(libvirt_uri, loop, guest_server="", images=copy.parent), private / "home")


def test_a_state_that_qemu_may_not_reach(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: GuestImage, private: Path
) -> None:
    folder = private / "state/guests"
    folder.mkdir(parents=True)
    survival = Survival(folder=folder, doors=folder, orphan_after_s=60)
    images = image.directory.parent
    refused(
        LibvirtDriver(libvirt_uri, loop, guest_server="", images=images, survival=survival), private
    )


def refused(driver: LibvirtDriver, barrier: Path) -> None:
    """Check that `state` and `create` both report `barrier`, the folder that denies access."""
    try:
        state = driver.state()
        with pytest.raises(Refused) as caught:
            driver.create(a_request()).close()
    finally:
        driver.close()
    assert not state.usable
    assert f"{barrier} denies access to QEMU's user" in state.detail
    assert f"{barrier} denies access to QEMU's user" in caught.value.message
    assert f"chmod o+x {barrier};" in caught.value.hint


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("balloon", "no balloon driver sent statistics within 20 s"),
        ("reporting", "it has no driver for its balloon device"),
    ],
)
def test_a_peer_that_does_not_answer_is_undecided(lab: Lab, method: str, reason: str) -> None:
    silent = SPEC.replace("method: none", f"method: {method}, {NO_BALLOON}")
    data = result(lab.run("run", lab.spec(silent), "-o", "json"), code=3)
    (trial,) = data["trials"]
    assert f"method {method} cannot work: {reason}" in trial["undecided"]
    assert not trial["lost"]
    lab.check_nothing_is_left()


def test_a_guest_whose_balloon_stops_answering_is_lost(
    connection: Any, image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is suspended, so that its balloon driver does not answer."""
    monkeypatch.setenv("HINTFLEET_IMAGE_DIR", str(image.directory.parent))
    with running_host_agent() as host:
        host.watch()
        name = f"silent-{uuid.uuid4().hex[:8]}"
        guests = Guests(host, {name: spec(host_pb2.BALLOON, memory_bytes=384 * MIB)})
        assert guests[name].pid
        connection.lookupByName(NAME_PREFIX + name).suspend()
        with pytest.raises(grpc.RpcError, match="its balloon driver sent no more stat") as lost:
            host.allocate(MIB, name)
        assert lost.value.code() is grpc.StatusCode.ABORTED

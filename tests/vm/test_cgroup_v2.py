"""Limits of cgroups v2 are found. Tested in a guest, because the host may have only v1."""

import asyncio
import uuid
from pathlib import Path

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import wait_until
from tests.support.vm import image_with, spec


def test_cgroups_of_v2_limit(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: GuestImage, readable_by_qemu: Path
) -> None:
    probe = Path(__file__).parent / "in_guest/cgroup_v2.py"
    images = image_with(image, {"hintfleet/sitecustomize.py": probe}, readable_by_qemu)
    identity = uuid.uuid4()
    request = GuestRequest(
        name=f"test-{identity.hex[:8]}",
        uuid=str(identity),
        token="t",
        spec=spec(host_pb2.NONE, memory_bytes=384 * MIB),
        on_gone=lambda _: None,
    )
    driver = LibvirtDriver(libvirt_uri, loop, guest_server="10.0.2.2:9", images=images)
    guest = driver.create(request)
    try:
        # Wait for the last line of the probe: what a guest prints arrives here in pieces, so an
        # earlier look could find half a line.
        wait_until(lambda: "PROBE done" in guest.evidence(), "the limits")
        said = [line for line in guest.evidence().splitlines() if line.startswith("PROBE")]
    finally:
        guest.close()
        driver.close()
    outer = "in cgroup /sys/fs/cgroup/outer"
    assert said == [
        f"PROBE total 150 MiB {outer}/inner",
        f"PROBE less True {outer}/inner",
        f"PROBE processors 0.5 {outer}",
        f"PROBE total 200 MiB {outer}",
        f"PROBE less True {outer}",
        f"PROBE processors 0.5 {outer}",
        "PROBE done",
    ]

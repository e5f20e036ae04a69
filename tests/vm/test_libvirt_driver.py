"""The libvirt driver makes real guests, refuses what this host cannot run, and loses a guest that
is killed while it is adopted. Also the kernel module, while agents run and die."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import GuestLost, Refused
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt import kvm_probe
from host_agent.guests.libvirt.devices import plug_door
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX, DomainSpec
from host_agent.guests.libvirt.driver import LibvirtDriver, _start
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import alive, wait_until
from tests.support.vm import image_with

libvirt = pytest.importorskip("libvirt")
libvirt_qemu = pytest.importorskip("libvirt_qemu")
MEMORY_BYTES = 1024 * MIB


def a_request(gone: list[str], method: host_pb2.Method.ValueType = host_pb2.NONE) -> GuestRequest:
    identity = uuid.uuid4()
    spec = host_pb2.GuestSpec(driver=host_pb2.LIBVIRT, memory_bytes=MEMORY_BYTES, method=method)
    return GuestRequest(
        name=f"test-{identity.hex[:8]}",
        uuid=str(identity),
        token="secret-of-this-guest",
        spec=spec,
        on_gone=gone.append,
    )


def guest_memory(domain: Any, address: int) -> bytes:
    """Return a page of guest physical memory, read by QEMU itself."""
    said = libvirt_qemu.qemuMonitorCommand(
        domain, f"xp /512gx {address:#x}", libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
    )
    words = re.findall(r"0x([0-9a-f]{16})", said)
    return b"".join(int(word, 16).to_bytes(8, "little") for word in words)


def test_a_guest_and_its_memory(driver: LibvirtDriver, connection: Any) -> None:
    gone: list[str] = []
    request = a_request(gone)
    guest = driver.create(request)
    try:
        assert guest.ram.provisioned_bytes == MEMORY_BYTES
        assert request.uuid in Path(f"/proc/{guest.pid}/cmdline").read_text()
        assert request.token not in Path(f"/proc/{guest.pid}/cmdline").read_text()
        wait_until(lambda: "hintfleet-init: started" in guest.evidence(), "the guest to boot")

        domain = connection.lookupByUUIDString(request.uuid)
        domain.suspend()
        resident = [r for r in guest.ram.resident(guest.ram.page_map) if r.pfn >= 256]
        assert len(resident) > 5
        for pfn in (r.pfn for r in resident[:: max(1, len(resident) // 16)]):
            ours = os.pread(guest.ram.only_fd(), 4096, pfn * 4096)
            assert ours == guest_memory(domain, pfn * 4096), f"pfn {pfn:#x}"

        with pytest.raises(Refused, match="already"):
            driver.create(request)
        assert not gone
        domain.destroy()
        wait_until(lambda: bool(gone), "on_gone after the domain was destroyed")
    finally:
        guest.close()
    guest.close()
    assert len(gone) == 1
    assert NAME_PREFIX + request.name not in [d.name() for d in connection.listAllDomains()]
    wait_until(lambda: not alive(guest.pid), "QEMU to end")
    # Only folders of this process: tests beside this one have guests of their own.
    assert not list(Path(tempfile.gettempdir()).glob(f"hintfleet-guest-{os.getpid()}-*"))


def test_the_module_over_an_agents_life_and_death(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, image: GuestImage, readable_by_qemu: Path
) -> None:
    probe = {"hintfleet/sitecustomize.py": Path(__file__).parent / "in_guest/sitecustomize.py"}
    images = image_with(image, probe, readable_by_qemu)
    driver = LibvirtDriver(libvirt_uri, loop, guest_server="10.0.2.2:9", images=images)
    gone: list[str] = []
    guest = driver.create(a_request(gone, host_pb2.HINTING))
    try:
        wait_until(lambda: bool(gone), "the guest to end")
        evidence = guest.evidence()
    finally:
        guest.close()
        driver.close()
    line = next((x for x in evidence.splitlines() if x.startswith("PROBE ")), None)
    assert line, evidence
    seen = json.loads(line.removeprefix("PROBE "))

    assert not seen["left_at_first"]
    assert "another guest agent" in seen["second_open"]
    assert seen["held"]
    assert not seen["while_held"]
    assert seen["wrong_ack"] == "ESTALE"
    assert seen["rmmod_while_held"] in ("EAGAIN", "EBUSY")
    assert seen["left_at_second"] == seen["held"]
    assert seen["wanted_after_return"]
    assert seen["drained_pages"] * 4096 >= 0.9 * 300 * MIB
    assert seen["again_pages"] * 4096 < 16 * MIB
    assert seen["woken"]
    assert seen["taken_back"] == "EAGAIN"
    assert seen["still_wanted"]
    assert seen["pages_later"] * 4096 >= 0.7 * 128 * MIB
    assert seen["longest_list_of_a_cpu"] < 512, "a per-CPU list can keep a whole chunk"
    assert seen["rmmod"] == ""
    assert "load the module" in seen["no_module"]


def test_kvm_that_starts_no_guest_is_tried_once(
    driver: LibvirtDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def start_without_kvm(connection: Any, spec: DomainSpec, **options: Any) -> Any:
        if spec.accelerator == "kvm":
            tried.append(spec.name)
            raise Refused("QEMU gave up")
        return _start(connection, spec, **options)

    monkeypatch.setattr("host_agent.guests.libvirt.driver._start", start_without_kvm)
    monkeypatch.setattr(kvm_probe, "cached", lambda _: None)
    for _ in range(2):
        driver.create(a_request([])).close()
    assert len(tried) == 1


def test_a_guest_that_is_killed_while_it_is_adopted_is_lost(
    driver: LibvirtDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    request = a_request(gone)
    guest = driver.create(request)
    try:

        def plug_too_late(domain: Any, socket: Path) -> None:
            plug_door(domain, socket)
            os.kill(guest.pid, signal.SIGKILL)

        monkeypatch.setattr("host_agent.guests.libvirt.driver.plug_door", plug_too_late)
        try:
            adopted = driver.adopt(request, guest.handle)
        except GuestLost:
            return
        # The guest was adopted: QEMU had handed over the memory before it was killed.
        try:
            wait_until(lambda: bool(gone), "the loss to be reported")
        finally:
            adopted.close()
    finally:
        guest.close()


def test_a_missing_libvirt_is_refused(loop: asyncio.AbstractEventLoop) -> None:
    driver = LibvirtDriver("qemu+unix:///system?socket=/nonexistent", loop, guest_server="")
    with pytest.raises(Refused, match="cannot connect to libvirt"):
        driver._connection.get()
    state = driver.state()
    driver.close()
    assert not state.usable
    assert "/nonexistent" in state.detail


def test_a_missing_image_is_refused(
    libvirt_uri: str, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    driver = LibvirtDriver(libvirt_uri, loop, guest_server="", images=tmp_path)
    with pytest.raises(Refused, match="make image"):
        driver.create(a_request([]))
    driver.close()


def test_an_image_that_qemu_cannot_read(
    libvirt_uri: str,
    loop: asyncio.AbstractEventLoop,
    image: GuestImage,
    readable_by_qemu: Path,
    connection: Any,
) -> None:
    if "system" not in libvirt_uri:
        pytest.skip("QEMU runs as this user here")
    images = image_with(image, {}, readable_by_qemu)
    readable_by_qemu.chmod(0o700)
    driver = LibvirtDriver(libvirt_uri, loop, guest_server="", images=images)
    gone: list[str] = []
    with pytest.raises(Refused, match=f"{readable_by_qemu} denies access to QEMU's user"):
        driver.create(a_request(gone))
    driver.close()
    assert not gone
    assert not [d for d in connection.listAllDomains() if d.name().startswith("hintfleet-test-")]

"""A guest that somebody else could have made: Debian with its stock kernel, systemd and the QEMU
guest agent. hintfleet's agent is installed, and not started. Needs root."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hintfleet.units import PAGE_BYTES
from host_agent.guests.libvirt.api import modules
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import HANG_S
from tests.support.own_libvirt import OwnLibvirt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "deploy/image"))

import common  # noqa: E402
import kit  # noqa: E402
import rootfs  # noqa: E402

_PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "python3", "libstdc++6", "qemu-guest-agent"),
    *("linux-image-cloud-amd64", "initramfs-tools"),
)
_SITE = "/usr/local/lib/python3.11/dist-packages"
_NETWORK = "[Match]\\nName=en*\\n[Network]\\nDHCP=yes\\n"
_FINISH = f"""
set -eu
printf '{_NETWORK}' >"$1/etc/systemd/network/10-en.network"
chroot "$1" systemctl enable systemd-networkd
chroot "$1" python3 -c 'import grpc, google.protobuf.message'
mv "$1"/boot/vmlinuz-* "$1/tmp/vmlinuz"
mv "$1"/boot/initrd.img-* "$1/tmp/initrd.img"
"""
_START_AGENT = """#!/usr/bin/python3
from guest_agent.__main__ import main

main()
"""
_UNITS = "etc/systemd/system"
KMOD = "/root/hintfleet_kmod.ko"
"""The file in the guest that has the kernel module; it is built for the guest's kernel, but not
loaded."""
_MEMORY_MIB = 1536
_PARAMETERS = "root=/dev/vda rw console=ttyS0 init_on_alloc=0 no_timer_check"


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What one foreign guest has in addition to what all of them have.

    :ivar parameters: more parameters of the kernel.
    :ivar packages: more packages.
    :ivar files: more files, by their paths in the guest.
    :ivar enabled: systemd units among `files` that start with the guest.
    :ivar has_cell: whether the domain's XML has a NUMA cell, so that DIMMs can be plugged. libvirt
        before 9.2 forgets, when it is restarted, that the memory of a running domain without a
        cell is shared.
    """

    parameters: str = ""
    packages: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    enabled: Sequence[str] = ()
    has_cell: bool = False


_NOTHING = Extra()


def foreign_layer(image: GuestImage, packages: Sequence[str] = ()) -> Path:
    """Return the folder with root.tar, vmlinuz and initrd.img of the guest. It is built, beside the
    layers of `image`, if it does not exist."""
    wheels = rootfs.pins((ROOT / "constraints.txt").read_text())
    packages = [*_PACKAGES, *packages]
    recipe = [*packages, *wheels, _NETWORK, _FINISH, _SITE]
    key = common.digest([common.SUITE, *recipe])
    layers = image.directory.parent.resolve() / "layers"
    return common.build_once(
        layers / f"foreign-{key}", "initrd.img", lambda to: _build(to, packages, wheels)
    )


def _build(to: Path, packages: list[str], wheels: list[str]) -> None:
    rootfs._install_wheels(to / "site", wheels)
    hooks = [
        ("customize", f'mkdir -p "$1{_SITE}"'),
        ("customize", f"sync-in {to / 'site'} {_SITE}"),
        ("customize", _FINISH),
        *(("customize", f"copy-out /tmp/{file} {to}") for file in ("vmlinuz", "initrd.img")),
        (
            "customize",
            'rm -rf "$1"/tmp/* "$1/var/cache" "$1/var/lib/apt"',
        ),
    ]
    common.mmdebstrap(to / "root.tar", packages, hooks, "minbase")
    shutil.rmtree(to / "site")
    for file in ("vmlinuz", "initrd.img"):
        (to / file).chmod(0o644)


@dataclass
class ForeignDomain:
    """A running domain that hintfleet did not make.

    :ivar find: returns its libvirt.virDomain.
    :ivar console: the file with what the guest prints.
    """

    find: Callable[[], Any]
    console: Path

    @property
    def domain(self) -> Any:
        return self.find()

    def run(self, *command: str) -> str:
        """Run a program in the guest, and wait for its end. Fail if its exit code is not 0; return
        what it wrote to stdout."""
        started = self._ask("guest-exec", path=command[0], arg=command[1:], **_CAPTURE)
        deadline_s = time.monotonic() + HANG_S
        while not (status := self._ask("guest-exec-status", pid=started["pid"]))["exited"]:
            assert time.monotonic() < deadline_s, command
            time.sleep(0.2)
        assert status.get("exitcode") == 0, (command, status)  # no exit code after a signal
        return base64.b64decode(status.get("out-data", "")).decode()

    def spawn(self, *command: str) -> None:
        """Run a program in the guest without waiting for its end."""
        self._ask("guest-exec", path=command[0], arg=command[1:])

    def per_cpu_bytes(self) -> int:
        """Return how much freed memory is on the kernel's per-CPU lists, of all zones (pagesets in
        /proc/zoneinfo; mm/vmstat.c)."""
        zones = self.run("/bin/cat", "/proc/zoneinfo")
        return sum(map(int, re.findall(r"cpu: \d+\s+count: (\d+)", zones))) * PAGE_BYTES

    def wait_for_boot(self) -> None:
        """Wait until the QEMU guest agent in the guest answers."""
        libvirt, _ = modules()
        deadline_s = time.monotonic() + HANG_S
        while True:
            try:
                self._ask("guest-ping")
                return
            except libvirt.libvirtError:
                said = self.console.read_text(errors="replace")[-1000:]
                assert time.monotonic() < deadline_s, said
                time.sleep(1)

    def _ask(self, command: str, **arguments: object) -> Any:
        _, libvirt_qemu = modules()
        query = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, query, 5, 0))["return"]


_CAPTURE = {"capture-output": True}


@contextmanager
def foreign_domain(
    libvirt: OwnLibvirt, image: GuestImage, name: str = "", extra: Extra = _NOTHING
) -> Iterator[ForeignDomain]:
    """Start a persistent domain whose XML has nothing of hintfleet; yield it while it boots. After
    the block remove its disk; the domain runs on until `libvirt` is ended."""
    layer = foreign_layer(image, extra.packages)
    module = kit.kit(layer.parent) / "modules/hintfleet_kmod.ko"
    folder = Path(tempfile.mkdtemp(prefix="hf-foreign-"))
    folder.chmod(0o755)
    try:
        disk = _make_disk(layer / "root.tar", module, folder, extra)
        console = folder / "console.log"
        made = libvirt.open().defineXML(_xml(layer, disk, console, extra, name))
        made.create()
        yield ForeignDomain(partial(libvirt.find, made.UUIDString()), console)
    finally:
        shutil.rmtree(folder)


def _make_disk(tar: Path, module: Path, folder: Path, extra: Extra) -> Path:
    """Make a disk with the guest's files and the agent of this source tree, installed."""
    tree, disk = folder / "tree", folder / "root.img"
    tree.mkdir()
    subprocess.run(["tar", "-x", "-f", tar, "-C", tree, "--exclude=./dev/*"], check=True)
    for package in (ROOT / "proto/hintfleet", ROOT / "guest_agent"):
        shutil.copytree(package, tree / _SITE.lstrip("/") / package.name)
    program = tree / "usr/bin/hintfleet-guest"
    program.write_text(_START_AGENT)
    program.chmod(0o755)
    shutil.copy(ROOT / "deploy/systemd/hintfleet-guest.service", tree / _UNITS)
    shutil.copy(module, tree / KMOD.lstrip("/"))
    for path, text in extra.files.items():
        file = tree / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    wanted = tree / _UNITS / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    for unit in extra.enabled:
        (wanted / unit).symlink_to(f"/{_UNITS}/{unit}")
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "2G"], check=True)
    shutil.rmtree(tree)
    disk.chmod(0o666)
    return disk


def _xml(layer: Path, disk: Path, console: Path, extra: Extra, name: str) -> str:
    identity = uuid.uuid4()
    ports = "".join(
        f"<controller type='pci' index='{index}' model='pcie-root-port'/>" for index in range(1, 7)
    )
    size = f"memory='{_MEMORY_MIB}' unit='MiB'"
    cell = (
        f"<maxMemory slots='4' unit='MiB'>{2 * _MEMORY_MIB}</maxMemory>"
        f"<cpu><numa><cell id='0' cpus='0' {size}/></numa></cpu>"
        if extra.has_cell
        else ""
    )
    return f"""
<domain type='qemu'><name>{name or f"db-{identity.hex[:8]}"}</name><uuid>{identity}</uuid>
 <memory unit='MiB'>{_MEMORY_MIB}</memory><vcpu>1</vcpu>
 <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>{cell}
 <os><type arch='x86_64' machine='q35'>hvm</type>
  <kernel>{layer}/vmlinuz</kernel><initrd>{layer}/initrd.img</initrd>
  <cmdline>{_PARAMETERS} {extra.parameters}</cmdline></os>
 <features><acpi/></features>
 <devices>
  <memballoon model='virtio'/>
  <controller type='pci' index='0' model='pcie-root'/>{ports}
  <disk type='file' device='disk'><driver name='qemu' type='raw'/>
   <source file='{disk}'><seclabel model='dac' relabel='no'/></source>
   <target dev='vda' bus='virtio'/></disk>
  <interface type='user'><model type='virtio'/></interface>
  <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  <serial type='file'><source path='{console}' append='on'/></serial>
 </devices>
</domain>"""

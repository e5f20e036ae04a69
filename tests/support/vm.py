"""Real guests under a real host agent: their specs, images with more files, guests that boot at the
same time, and ways to read a guest's RAM, books and console."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc

from hintfleet.ranges import RangeSet
from hintfleet.units import GIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.dimm_xml import dimms_of
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX
from host_agent.guests.libvirt.image import GuestImage
from host_agent.memory.ram import GuestRam, Segment
from tests.support.agents import HANG_S, TRIAL, HostAgent, wait_until

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "deploy/image"))

import cpio  # noqa: E402

_BOOTS_AT_ONCE = 3
_LOW_PAGES = 2 * GIB // 4096


def image_with(image: GuestImage, files: dict[str, Path], to: Path) -> Path:
    """Make in `to` an image directory whose only image is `image` with more files; return `to`.

    The files are appended to the initrd as a second cpio archive: the kernel unpacks all archives
    of an initrd.

    :param files: by their paths in the initrd.
    """
    made = to / "with-files"
    made.mkdir()
    for path in (image.kernel, image.root_disk, image.directory / "image.json"):
        (made / path.name).symlink_to(path)
    more = cpio.archive(cpio.file(name, path.read_bytes()) for name, path in files.items())
    (made / "initrd.img").write_bytes(image.initrd.read_bytes() + more)
    (to / "current").symlink_to("with-files")
    return to


def qemu_ram(domain: Any) -> GuestRam:
    """Open a guest's RAM files through /proc, without asking QEMU or the host agent.

    Needs root.
    """
    pid = int(Path(f"/run/libvirt/qemu/{domain.name()}.pid").read_text())
    files: dict[int, int] = {}
    # In the order of descriptor numbers: QEMU opens the RAM files of NUMA nodes in node order.
    for number in sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()):
        entry = Path(f"/proc/{pid}/fd/{number}")
        with suppress(FileNotFoundError):  # QEMU may have closed it by now
            if os.readlink(entry).startswith("/memfd:memory-backend-memfd"):
                inode = entry.stat().st_ino
                files[inode] = files.get(inode) or os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    dimms = {dimm.size_bytes: dimm for dimm in dimms_of(domain.XMLDesc())}
    segments: list[Segment] = []
    pfn = 0
    # RAM files of DIMMs come last. A DIMM's file is found by its size, which no node's file has.
    for fd in sorted(files.values(), key=lambda fd: os.fstat(fd).st_size in dimms):
        if dimm := dimms.get(os.fstat(fd).st_size):
            pfn = dimm.address // 4096
        left, offset_bytes = os.fstat(fd).st_size // 4096, 0
        while left:
            # On q35, RAM of 2.75 GiB or more ends at 2 GiB, and continues at 4 GiB.
            page_count = min(left, _LOW_PAGES - pfn) if pfn < _LOW_PAGES else left
            segments.append(
                Segment(pfn=pfn, page_count=page_count, fd=fd, offset_bytes=offset_bytes)
            )
            pfn += page_count
            pfn = 2 * _LOW_PAGES if pfn == _LOW_PAGES else pfn
            left, offset_bytes = left - page_count, offset_bytes + page_count * 4096
    return GuestRam(segments)


def spec(
    method: host_pb2.Method.ValueType = host_pb2.HINTING,
    *,
    isolator: str = "",
    policy: str = "",
    parameters: str = "",
    memory_bytes: int = GIB,
    max_memory_bytes: int = 0,
    node_count: int = 0,
    balloon: host_pb2.BalloonSettings | None = None,
) -> host_pb2.GuestSpec:
    """Return the spec of a real guest for a test."""
    return host_pb2.GuestSpec(
        driver=host_pb2.LIBVIRT,
        memory_bytes=memory_bytes,
        max_memory_bytes=max_memory_bytes,
        node_count=node_count,
        method=method,
        hinting=host_pb2.HintingSettings(isolator=isolator, policy=policy),
        kernel_parameters=parameters,
        balloon=balloon,
    )


NODES_MEMORY_BYTES = 3 * GIB
_HOLES = "memmap=1248M$160M memmap=320M$1664M memmap=640M$4480M"


def nodes_spec(isolator: str, parameters: str = "") -> host_pb2.GuestSpec:
    """Return the spec of a guest with two NUMA nodes. The second node begins at 1.5 GiB, and has
    memory above 4 GiB as well. Most of the memory is holes, so that a small workload soon uses
    each zone."""
    return spec(
        isolator=isolator,
        parameters=f"{_HOLES} {parameters}",
        memory_bytes=NODES_MEMORY_BYTES,
        max_memory_bytes=NODES_MEMORY_BYTES + 128 * MIB,
        node_count=2,
    )


class Guests:
    """Guests by name, created in threads. `guests[name]` waits until the guest is created; if that
    failed, it raises the error."""

    def __init__(self, host: HostAgent, specs: Mapping[str, host_pb2.GuestSpec]) -> None:
        self.host = host
        self._pool = ThreadPoolExecutor(_BOOTS_AT_ONCE)
        self._made: dict[str, Future[host_pb2.Guest]] = {
            name: self._pool.submit(self._create, name, spec) for name, spec in specs.items()
        }

    def _create(self, name: str, spec: host_pb2.GuestSpec) -> host_pb2.Guest:
        request = host_pb2.CreateGuestRequest(
            command=host_pb2.CommandId(trial_id=TRIAL), name=name, spec=spec
        )
        return self.host.stub.CreateGuest(request, timeout=HANG_S)

    def wait(self) -> None:
        """Wait until each guest has booted, or failed to: a boot disturbs what a test measures."""
        self._pool.shutdown()

    def __getitem__(self, name: str) -> host_pb2.Guest:
        return self._made[name].result()

    def failure(self, name: str) -> str:
        """Return why creating a guest failed.

        :raises AssertionError: the guest was created.
        """
        error = self._made[name].exception()
        if not isinstance(error, grpc.RpcError):
            raise AssertionError(f"guest {name} came up")
        return str(error.details())

    def ledger(self, name: str) -> host_pb2.Ledger:
        return self.host.guests()[name].ledger

    def resident(self, name: str, connection: Any) -> RangeSet:
        """Return the resident pages, as the RAM files themselves show them."""
        with closing(qemu_ram(connection.lookupByName(NAME_PREFIX + name))) as ram:
            return ram.resident(ram.page_map).ranges()

    def falls_to(self, name: str, resident_bytes: int) -> None:
        """Wait until, by its books, no more than `resident_bytes` of the guest are resident."""
        try:
            wait_until(
                lambda: self.ledger(name).resident_bytes <= resident_bytes,
                f"no more than {resident_bytes // MIB} MiB of {name} to be resident",
            )
        except AssertionError as error:
            error.add_note(str(self.host.guests()[name]))
            raise

    def balances(self, name: str, connection: Any) -> None:
        """Check that the books of a guest balance, and agree with its RAM files. The guest is
        suspended while both are read."""
        domain = connection.lookupByName(NAME_PREFIX + name)
        domain.suspend()
        try:
            books = self.ledger(name)
            resident_bytes = self.resident(name, connection).page_count * 4096
        finally:
            domain.resume()
        assert books.resident_bytes == resident_bytes
        assert (
            books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
            == books.provisioned_bytes
        )
        assert books.reclaimed_now_bytes == (
            books.reclaimed_total_bytes - books.refaulted_total_bytes - books.unplugged_total_bytes
        )


def console(pid: int) -> str:
    """Return the console output of a guest so far; `pid` is the process id of its QEMU."""
    files = [
        Path(argument.removeprefix("name=opt/org.hintfleet/config,file="))
        for argument in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if argument.startswith("name=opt/org.hintfleet/config,")
    ]
    return (files[0].parent / "console.log").read_text(errors="replace")

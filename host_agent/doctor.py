"""What this host can run, found out by trying it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from hintfleet.errors import HintfleetError
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import find_image
from host_agent.memory.ram import GuestRam, Segment
from host_agent.memory.reclaim import reclaim

Finding = dict[str, str | bool]


def examine(libvirt_uri: str) -> list[Finding]:
    """Findings in the order a newcomer needs them: name, ok, detail, hint."""
    return list(_examine(libvirt_uri))


def _examine(libvirt_uri: str) -> Iterator[Finding]:
    yield _try("hole punch on a memfd", _punch_a_memfd)
    yield _try("guest image", lambda: f"kernel {find_image().kernel_release}")
    yield _try("libvirt", lambda: _libvirt_detail(libvirt_uri))


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return {"name": name, "ok": True, "detail": check(), "hint": ""}
    except HintfleetError as error:
        return {"name": name, "ok": False, "detail": error.message, "hint": error.hint}
    except OSError as error:
        return {"name": name, "ok": False, "detail": str(error), "hint": ""}


def _punch_a_memfd() -> str:
    size_bytes = 2 * MIB
    fd = os.memfd_create("hintfleet-doctor")
    os.truncate(fd, size_bytes)
    pages = size_bytes // PAGE_BYTES
    ram = GuestRam([Segment(pfn=0, page_count=pages, fd=fd, offset_bytes=0)])
    try:
        os.pwrite(fd, b"\1" * size_bytes, 0)
        outcome = reclaim(ram, RangeSet([(0, pages)]), ram.page_map)
        left_bytes = ram.resident_bytes()
    finally:
        ram.close()
    if left_bytes or outcome.reclaimed.page_count != pages:
        raise OSError(f"{left_bytes} bytes were still resident after the punch")
    return f"{size_bytes // MIB} MiB written, punched and gone"


def _libvirt_detail(uri: str) -> str:
    driver = LibvirtDriver(uri, guest_server="")
    try:
        state = driver.state()
    finally:
        driver.close()
    if not state.usable:
        raise HintfleetError(state.detail)
    return state.detail

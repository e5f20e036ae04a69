"""Finds out what this host can run: `hintfleet-host --doctor`.

It punches a hole into a memfd, reads the guest image, and connects to libvirt; it starts no guest.
orchestrator/doctor.py runs that command, and has more checks.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from threading import Thread

from hintfleet.errors import HintfleetError, TransientError
from hintfleet.findings import Finding
from hintfleet.ranges import RangeSet
from hintfleet.settings import Driver
from hintfleet.units import MIB, PAGE_BYTES
from host_agent.guests.libvirt.driver import LibvirtDriver
from host_agent.guests.libvirt.image import find_image
from host_agent.memory.ram import GuestRam, Segment
from host_agent.memory.reclaim import reclaim

_LIBVIRT_TIMEOUT_S = 30.0


def examine(libvirt_uri: str) -> list[Finding]:
    """Run all checks; return their findings in the order in which to solve problems."""
    return [
        _try("hole punch on a memfd", Driver.EMBEDDED, _punch_a_memfd),
        _try("guest image", Driver.LIBVIRT, lambda: f"kernel {find_image().kernel_release}"),
        _try("libvirt", Driver.LIBVIRT, lambda: _libvirt_detail(libvirt_uri)),
    ]


def _try(name: str, needed_for: Driver, check: Callable[[], str]) -> Finding:
    ok, hint = True, ""
    try:
        detail = check()
    except HintfleetError as error:
        ok, detail, hint = False, error.message, error.hint
    except OSError as error:
        ok, detail = False, str(error)
    return Finding(name=name, ok=ok, detail=detail, hint=hint, needed_for=needed_for)


def _punch_a_memfd() -> str:
    size_bytes = 2 * MIB
    fd = os.memfd_create("hintfleet-doctor")
    os.truncate(fd, size_bytes)
    pages = size_bytes // PAGE_BYTES
    ram = GuestRam([Segment(pfn=0, page_count=pages, fd=fd, offset_bytes=0)])
    try:
        os.pwrite(fd, b"\1" * size_bytes, 0)
        outcome = reclaim(ram, RangeSet([(0, pages)]), ram.page_map, ram.permit())
        left_bytes = ram.resident_bytes()
    finally:
        ram.close()
    if left_bytes or outcome.reclaimed.page_count != pages:
        raise OSError(f"{left_bytes} bytes were still resident after the punch")
    return f"{size_bytes // MIB} MiB written, punched and gone"


def _libvirt_detail(uri: str) -> str:
    """Return what libvirt says of itself.

    :raises HintfleetError: real guests cannot run here, or libvirt does not answer within 30 s.
    """
    answer: Future[str] = Future()

    def ask() -> None:
        try:
            answer.set_result(_ask_libvirt(uri))
        except BaseException as error:  # noqa: BLE001 - it is raised in the other thread
            answer.set_exception(error)

    # In a thread of its own: libvirt waits without limit for a libvirtd that hangs.
    Thread(target=ask, name="libvirt", daemon=True).start()
    try:
        return answer.result(_LIBVIRT_TIMEOUT_S)
    except TimeoutError:
        raise TransientError("libvirt does not answer", hint="restart libvirtd") from None


def _ask_libvirt(uri: str) -> str:
    # The driver makes no guests here, so it needs no loop that runs.
    with (
        closing(asyncio.new_event_loop()) as loop,
        closing(LibvirtDriver(uri, loop, guest_server="")) as driver,
    ):
        state = driver.state()
    if not state.usable:
        raise HintfleetError(state.detail)
    return state.detail

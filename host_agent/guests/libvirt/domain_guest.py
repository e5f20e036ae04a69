"""A guest that is a libvirt domain: what it owns, and the notice of its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from hintfleet.ranges import RangeSet
from host_agent.door.door import MemoryDoor
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.guests.driver import Handle
from host_agent.guests.libvirt.dimms import Dimms
from host_agent.guests.libvirt.runtime_dir import RuntimeDir
from host_agent.memory.ram import GuestRam, Segment

_EVIDENCE_LINES = 40


class EndNotice:
    """Calls `on_gone` once, at the first report that a guest is gone; not for reports that come
    after `silence`."""

    def __init__(self, on_gone: Callable[[str], None]) -> None:
        self._on_gone = on_gone
        self._lock = Lock()
        self._is_over = False

    def give(self, reason: str) -> None:
        """Report that the guest is gone. May be called from any thread."""
        if self._end():
            self._on_gone(reason)

    def silence(self) -> None:
        """Report nothing from now on: the owner ends the guest itself."""
        self._end()

    def _end(self) -> bool:
        # libvirt's event thread and a driver's thread may call this at the same time.
        with self._lock:
            is_first, self._is_over = not self._is_over, True
        return is_first


class LibvirtGuest:
    """A running guest, made or adopted by LibvirtDriver."""

    handle: Handle = {}
    """Empty: libvirt finds the domain by its UUID."""

    def __init__(
        self,
        *,
        domain: str,
        ram: GuestRam,
        door: MemoryDoor,
        balloon: Balloon | None,
        reporting: Reporting | None,
        dimms: Dimms,
        hypervisor: str,
        files: RuntimeDir,
        end_notice: EndNotice,
        forget: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        """Take ownership of RAM, door and files.

        :param forget: stops watching the domain.
        :param end: ends the domain, which may be gone already.
        """
        self.pid = door.pid
        self.domain = domain
        self.hypervisor = hypervisor
        self.ram = ram
        self.door: MemoryDoor | None = door
        self._end_door = door.close
        self.balloon = balloon
        self.reporting = reporting
        self._dimms = dimms
        self._files = files
        self._end_notice = end_notice
        self._forget = forget
        self._end = end

    def plugged(self) -> RangeSet:
        return self._dimms.pages()

    def plug(self, size_bytes: int) -> Sequence[Segment]:
        return self._dimms.plug(size_bytes, self.ram.pages)

    def to_unplug(self, size_bytes: int) -> Sequence[RangeSet]:
        return self._dimms.to_unplug(size_bytes)

    def unplug(self, pages: RangeSet) -> None:
        self._dimms.unplug(pages)

    def evidence(self) -> str:
        return self._files.console_tail(_EVIDENCE_LINES)

    def close(self) -> None:
        # Silence first: ending the domain causes an event, which must not be reported.
        self._end_notice.silence()
        self._end()
        self._forget()
        self._end_door()
        self.ram.close()
        self._files.remove()

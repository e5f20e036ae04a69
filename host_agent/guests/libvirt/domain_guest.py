"""A guest that is a domain: what it owns, and how its end is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from hintfleet.ranges import RangeSet
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.guests.driver import Handle
from host_agent.guests.libvirt.domain_ram import Dimms
from host_agent.guests.libvirt.runtime_dir import RuntimeDir
from host_agent.memory.ram import GuestRam, Segment

_EVIDENCE_LINES = 40


class EndNotice:
    """Tells once that a guest is gone, and not at all after its owner has ended it."""

    def __init__(self, on_gone: Callable[[str], None]) -> None:
        self._on_gone = on_gone
        self._lock = Lock()
        self._given = False

    def give(self, reason: str) -> None:
        """Tell it, from any thread."""
        if self._first():
            self._on_gone(reason)

    def silence(self) -> None:
        """Have it told no more."""
        self._first()

    def _first(self) -> bool:
        with self._lock:
            first, self._given = not self._given, True
        return first


class LibvirtGuest:
    """A guest that runs; made by LibvirtDriver.create."""

    handle: Handle = {}
    """Its UUID says it all."""

    def __init__(
        self,
        *,
        pid: int,
        ram: GuestRam,
        balloon: Balloon | None,
        reporting: Reporting | None,
        dimms: Dimms,
        files: RuntimeDir,
        end_notice: EndNotice,
        forget: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        """Own all of them.

        :param end: ends the domain, which may be gone already.
        """
        self.pid = pid
        self.ram = ram
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
        self._end_notice.silence()
        self._end()
        self._forget()
        self.ram.close()
        self._files.remove()

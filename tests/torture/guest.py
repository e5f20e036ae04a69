"""A guest under torture, as the injectors of faults need it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from hintfleet.v1 import host_pb2
from tests.support.relay import Link, Relay
from tests.torture.report import Report


@dataclass(kw_only=True)
class Victim:
    """One guest, from the moment when it is ready until it is gone.

    :ivar domain: a libvirt.virDomain; None for an embedded guest.
    :ivar is_grown: memory was plugged into it.
    :ivar answered_s: when it last answered a step of its workload.
    :ivar doomed: a fault has ended it, or will. The end of a guest that is not doomed is a problem.
    """

    name: str
    uuid: str
    spec: host_pb2.GuestSpec
    pid: int
    domain: Any | None
    relay: Relay
    doomed: bool = False
    is_grown: bool = False
    answered_s: float = field(default_factory=time.monotonic)
    _pidfd: int = field(init=False)

    def __post_init__(self) -> None:
        # Not just the number: another process may have it when a fault is injected.
        self._pidfd = os.pidfd_open(self.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the guest's process.

        :raises ProcessLookupError: it is gone.
        """
        if self._pidfd < 0:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    @property
    def links(self) -> list[Link]:
        """Return the guest's open connections."""
        return self.relay.links_of(self.uuid)

    @property
    def earlier_links(self) -> list[Link]:
        """Return the guest's last closed connections."""
        return self.relay.closed.get(self.uuid, [])

    async def stand_still(self) -> None:
        """Stop all changes, so that the books can be checked."""
        if self.domain is not None:
            await asyncio.to_thread(self.domain.suspend)

    def read_console(self, report: Report) -> None:
        """Add to the report what the guest prints about itself; an embedded guest prints
        nothing."""

    def evidence(self) -> str:
        """Return the end of what the guest has printed, if that can be read."""
        return ""

    def forget(self) -> None:
        """Note that the guest is gone: faults that still hold it have no effect."""
        if self._pidfd >= 0:
            # SIGCONT, because a stopped process could not end.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            os.close(self._pidfd)
            self._pidfd = -1
            self.relay.closed.pop(self.uuid, None)

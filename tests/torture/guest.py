"""A guest under torture, as what injects faults sees it."""

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
    """One guest, from when it is ready until it is gone.

    :ivar domain: a libvirt.virDomain; None for an embedded guest.
    :ivar is_grown: memory was plugged into it.
    :ivar answered_s: when it last answered a step of its workload.
    :ivar doomed: a fault has ended it, or will; otherwise its end is a problem.
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
        # Not by number alone: that may be somebody else's by the time a fault strikes.
        self._pidfd = os.pidfd_open(self.pid)

    def signal(self, number: int) -> None:
        """Send a signal to its process.

        :raises ProcessLookupError: it is gone.
        """
        if self._pidfd < 0:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    @property
    def links(self) -> list[Link]:
        """Its open connections."""
        return self.relay.of(self.uuid)

    @property
    def earlier_links(self) -> list[Link]:
        """Its last connections that are closed."""
        return self.relay.closed.get(self.uuid, [])

    async def stand_still(self) -> None:
        """Have nothing change any more, so that its books can be looked at."""
        if self.domain is not None:
            await asyncio.to_thread(self.domain.suspend)

    def look(self, report: Report) -> None:
        """Report what it says of itself; an embedded guest says nothing."""

    def evidence(self) -> str:
        """The last of what it wrote, where that can be had."""
        return ""

    def forget(self) -> None:
        """It is gone; faults that still hold it strike nothing."""
        if self._pidfd >= 0:
            # A guest that was stopped could not end.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            os.close(self._pidfd)
            self._pidfd = -1
            self.relay.closed.pop(self.uuid, None)

"""A guest under torture, as the injectors of faults need it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from hintfleet.v1 import host_pb2
from tests.support.relay import Link, Relay
from tests.torture.report import Report


@dataclass(kw_only=True)
class Victim:
    """One guest, from the moment when it is ready until it is gone.

    :ivar find_domain: returns its libvirt.virDomain; None for an embedded guest.
    :ivar is_grown: whether the last ResizeGuest that was answered without an error has plugged
        memory into it; not kept for an attached guest.
    :ivar answered_s: when it last answered a step of its workload, on the monotonic clock; before
        that, when this object was made.
    :ivar doomed: a fault has ended it, will end it, or may. The end of a guest that is not doomed
        is a problem.
    """

    name: str
    uuid: str
    spec: host_pb2.GuestSpec
    pid: int
    find_domain: Callable[[], Any] | None
    relay: Relay
    doomed: bool = False
    is_grown: bool = False
    answered_s: float = field(default_factory=time.monotonic)
    _pidfd: int = field(init=False)

    @classmethod
    def of(
        cls,
        guest: host_pb2.Guest,
        relay: Relay,
        find_domain: Callable[[], Any] | None = None,
        **more: Any,
    ) -> Self:
        """Make the victim of a guest that a host agent has made or attached."""
        return cls(
            name=guest.name,
            uuid=guest.uuid,
            spec=guest.spec,
            pid=guest.pid,
            find_domain=find_domain,
            relay=relay,
            **more,
        )

    def __post_init__(self) -> None:
        # Signals go to a pidfd: another process may have the id when a fault is injected.
        self._pidfd = os.pidfd_open(self.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the guest's process.

        :raises ProcessLookupError: the process is gone, or `forget` was called.
        """
        if self._pidfd < 0:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    @property
    def domain(self) -> Any:
        """Return the guest's libvirt.virDomain.

        :raises libvirt.libvirtError: it is gone, or libvirt does not answer.
        """
        assert self.find_domain is not None, "an embedded guest"
        return self.find_domain()

    @property
    def links(self) -> list[Link]:
        """Return the guest's open connections."""
        return self.relay.links_of(self.uuid)

    @property
    def earlier_links(self) -> list[Link]:
        """Return the guest's most recently closed connections."""
        return self.relay.closed.get(self.uuid, [])

    async def stand_still(self) -> None:
        """Suspend a virtual machine, so that its memory does not change while the books are
        checked. Do nothing to an embedded guest."""
        if self.find_domain is not None:
            await asyncio.to_thread(lambda: self.domain.suspend())

    def read_console(self, report: Report) -> None:
        """Add to the report what is new on the guest's console; nothing for an embedded guest,
        which has no console."""

    def evidence(self) -> str:
        """Return the end of what the guest has printed; an empty text for an embedded guest, or if
        that cannot be read."""
        return ""

    def forget(self) -> None:
        """Note that the guest is gone: `signal` raises ProcessLookupError from now on."""
        if self._pidfd >= 0:
            # SIGCONT: a process that a fault has suspended could not end by itself.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            os.close(self._pidfd)
            self._pidfd = -1
            self.relay.closed.pop(self.uuid, None)

"""The interface of drivers: how guests of any kind are made, used and ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hintfleet.ranges import RangeSet
from hintfleet.v1 import host_pb2
from host_agent.door.door import MemoryDoor
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.memory.ram import GuestRam, Segment

Handle = Mapping[str, int]
"""What a driver needs to find a guest again, besides its name and UUID."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Settings for guests that outlive the host agent.

    :ivar folder: has a folder for each guest's files.
    :ivar doors: folder for the sockets of memory doors; its path is short.
    :ivar orphan_after_s: after this time without a host agent a guest ends by itself.
    """

    folder: Path
    doors: Path
    orphan_after_s: int

    def door(self, guest_uuid: str) -> Path:
        """Return where the socket of a guest's memory door is."""
        return self.doors / f"{guest_uuid}.sock"


@dataclass(frozen=True, kw_only=True)
class GuestRequest:
    """What a driver needs to make a guest.

    :ivar name: unique on this host; letters, digits and `-`.
    :ivar token: the secret that authenticates the guest's streams; made in registry.py: `add`.
    :ivar spec: driver, memory_bytes, method and hinting settings.
    :ivar on_gone: called once, from any thread, with a reason when the guest is gone or about
        to be (stopped, crashed, reset). Its epoch must end then.
    """

    name: str
    uuid: str
    token: str
    spec: host_pb2.GuestSpec
    on_gone: Callable[[str], None]


class RunningGuest(Protocol):
    """A running guest, owned by the caller of `create` or `adopt`.

    :ivar door: through which the memory came; None if it may be punched at any time.
    :ivar balloon: its target is set by the owner; None unless the method is BALLOON.
    :ivar reporting: None unless the method is REPORTING.
    """

    pid: int
    ram: GuestRam
    door: MemoryDoor | None
    balloon: Balloon | None
    reporting: Reporting | None

    @property
    def handle(self) -> Handle:
        """What another host agent needs for `adopt`."""

    def plugged(self) -> RangeSet:
        """Return the plugged memory that is there now."""

    def plug(self, size_bytes: int) -> Sequence[Segment]:
        """Plug memory and return its segments, which the caller then owns. The guest does not
        use the memory before it is told to. `ram` is not changed.

        :raises hintfleet.errors.Refused: the memory cannot be plugged; nothing has changed.
        """

    def to_unplug(self, size_bytes: int) -> Sequence[RangeSet]:
        """Return which pages to unplug for this size, device by device.

        :raises hintfleet.errors.Refused: no set of memory devices has this size; says what can
            be unplugged.
        """

    def unplug(self, pages: RangeSet) -> None:
        """Unplug a device that `to_unplug` named and that the guest does not use any more.
        `ram` is not changed.

        :raises hintfleet.errors.Refused: the guest did not release it; nothing has changed.
        :raises hintfleet.errors.OutcomeUnknown: the guest did not answer in time.
        """

    def evidence(self) -> str:
        """Return the last lines of the guest's console or its process's log."""

    def close(self) -> None:
        """End the guest and free all that it held: process, domain, memory, files.

        May be called twice. A guest that is gone already is no error.
        """


class GuestMaker(Protocol):
    """Makes or attaches guests of one kind. Methods may block; they are called from worker
    threads."""

    def create(self, request: GuestRequest) -> RunningGuest:
        """Start a guest; its agent connects by itself later. Nothing is left after a failure.

        :raises hintfleet.errors.Refused: this host cannot run it; says why.
        """

    def adopt(self, request: GuestRequest, handle: Handle) -> RunningGuest:
        """Take over a guest that an earlier host agent made from this request. A failure changes
        nothing.

        Only under Survival, and only if no other host agent can work on the guest.

        :raises hintfleet.errors.GuestLost: it is gone.
        :raises hintfleet.errors.Refused: whether it is gone is not known, or it cannot be used.
        """

    def close(self) -> None:
        """Close connections. All guests must be closed before, or meant to survive."""


class GuestDriver(GuestMaker, Protocol):
    """Makes guests for trials."""

    def state(self) -> host_pb2.DriverState:
        """Return whether this host can run such guests, and with which versions, or why not."""

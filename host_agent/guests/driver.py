"""Guests of a host, whatever they are: what a driver makes and the service uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hintfleet.ranges import RangeSet
from hintfleet.v1 import host_pb2
from host_agent.guests.balloon import Balloon, Reporting
from host_agent.memory.ram import GuestRam, Segment

Handle = Mapping[str, int]
"""What a driver needs, beside name and uuid, to find a guest again."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """That guests outlive the host agent, where their files are, and for how long.

    :ivar folder: holds a folder for each guest.
    :ivar orphan_after_s: a guest that has had no host agent for so long ends by itself.
    """

    folder: Path
    orphan_after_s: int


@dataclass(frozen=True, kw_only=True)
class GuestRequest:
    """What a driver needs to make a guest.

    :ivar name: unique on this host; letters, digits and `-`.
    :ivar token: the secret that binds the guest's streams to it.
    :ivar spec: driver, memory_bytes, method and hinting settings.
    :ivar on_gone: called once, from any thread, with a reason when the guest is
        gone or about to be (stopped, crashed, reset): its epoch must end.
    """

    name: str
    uuid: str
    token: str
    spec: host_pb2.GuestSpec
    on_gone: Callable[[str], None]


class RunningGuest(Protocol):
    """A guest that runs; owned by whoever called `create` or `adopt`.

    :ivar balloon: to be moved by the owner; None except under method BALLOON.
    :ivar reporting: None except under method REPORTING.
    """

    pid: int
    ram: GuestRam
    balloon: Balloon | None
    reporting: Reporting | None

    @property
    def handle(self) -> Handle:
        """For `adopt`, by another host agent."""

    def plugged(self) -> RangeSet:
        """Memory that was plugged and is there now."""

    def plug(self, size_bytes: int) -> Sequence[Segment]:
        """Give the guest more memory, to be owned by whoever called; the guest does not
        use it before it is told to. `ram` is not changed here.

        :raises hintfleet.errors.Refused: it cannot be had; nothing has changed.
        """

    def to_unplug(self, size_bytes: int) -> Sequence[RangeSet]:
        """Which pages to take for so much, device by device.

        :raises hintfleet.errors.Refused: no set of memory devices is so large; says
            what can be taken.
        """

    def unplug(self, pages: RangeSet) -> None:
        """Take a device that `to_unplug` named, which the guest uses no longer. `ram` is not
        changed.

        :raises hintfleet.errors.Refused: the guest holds on to it; nothing has changed.
        :raises hintfleet.errors.OutcomeUnknown: it did not say in time.
        """

    def evidence(self) -> str:
        """The last lines that the guest or its process wrote (console, log)."""

    def close(self) -> None:
        """End the guest and free all that it held: process, domain, memory, files.

        Does not raise if it is gone already; may be called twice.
        """


class GuestDriver(Protocol):
    """Makes guests of one kind. All methods may block; called from worker threads."""

    def state(self) -> host_pb2.DriverState:
        """Whether this host can run such guests, with what, or why not."""

    def create(self, request: GuestRequest) -> RunningGuest:
        """Start a guest; its agent connects by itself later.

        :raises hintfleet.errors.Refused: this host cannot run it; says why.
        Nothing stays behind after a failure.
        """

    def adopt(self, request: GuestRequest, handle: Handle) -> RunningGuest:
        """Take over a guest that an earlier host agent made from this request.

        Only under Survival, and only where no other host agent can be at work on it.

        :raises hintfleet.errors.GuestLost: it is gone.
        :raises hintfleet.errors.Refused: this host cannot tell, or cannot take it over.
        Nothing is changed by a failure.
        """

    def close(self) -> None:
        """Let go of connections. Guests must have been closed before, or are to survive."""

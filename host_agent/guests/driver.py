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
"""What `adopt` and `has_ended` need besides the request or the UUID; may be empty."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Settings for guests that outlive the host agent.

    :ivar folder: contains a folder for each guest's files.
    :ivar doors: folder for the sockets of memory doors; its path is kept short, because a socket's
        path has 107 bytes at most (unix(7)).
    :ivar orphan_after_s: after this time without a host agent a guest ends by itself; not an
        attached guest.
    """

    folder: Path
    doors: Path
    orphan_after_s: int

    def door(self, guest_uuid: str) -> Path:
        """Return the path of the socket of a guest's memory door."""
        return self.doors / f"{guest_uuid}.sock"


@dataclass(frozen=True, kw_only=True)
class GuestRequest:
    """What a driver needs to make, attach or adopt a guest.

    :ivar name: unique on this host; letters, digits and `-`.
    :ivar token: the secret that authenticates the guest's streams; made in registry.py: `add`.
    :ivar spec: the guest's driver, sizes, method and settings (host.proto).
    :ivar on_gone: treats the guest as lost. The driver calls it, from any thread, with the reason:
        the guest has ended, was reset or went to sleep, the connection to libvirt was lost, or an
        attached guest's door is disconnected. It may be called again, and after `close`.
    """

    name: str
    uuid: str
    token: str
    spec: host_pb2.GuestSpec
    on_gone: Callable[[str], None]


class RunningGuest(Protocol):
    """A running guest, owned by the caller of `create` or `adopt`.

    :ivar domain: name of its libvirt domain; empty for an embedded guest.
    :ivar hypervisor: as in host_pb2.Guest.
    :ivar door: the memory door at which QEMU handed over the RAM; None for RAM that may be
        punched at any time.
    :ivar balloon: the owner sets its target; None unless the method is BALLOON.
    :ivar reporting: None unless the method is REPORTING.

    `plugged`, `plug`, `to_unplug` and `unplug` also raise hintfleet.errors.GuestLost if the guest's
    domain is gone, and Refused if libvirt does not answer.
    """

    pid: int
    domain: str
    hypervisor: str
    ram: GuestRam
    door: MemoryDoor | None
    balloon: Balloon | None
    reporting: Reporting | None

    @property
    def handle(self) -> Handle:
        """What `adopt` by a later host agent and `has_ended` need besides the guest's UUID; may be
        empty."""

    def plugged(self) -> RangeSet:
        """Return the pages that `plug` has added, and that are not unplugged yet."""

    def plug(self, size_bytes: int) -> Sequence[Segment]:
        """Plug memory and return its segments, which the caller then owns. The guest does not
        use the memory before its agent onlines it. `ram` is not changed.

        :raises hintfleet.errors.Refused: the memory cannot be plugged. Nothing has changed, except
            that `plugged` may return more: a device that could not be taken out again. It must be
            unplugged before the next `plug`.
        """

    def to_unplug(self, size_bytes: int) -> Sequence[RangeSet]:
        """Return the pages to unplug to make the guest smaller by this size: one set for each
        memory device.

        :raises hintfleet.errors.Refused: the memory devices with the highest addresses do not add
            up to exactly this size (the message lists all devices), or the guest is attached.
        """

    def unplug(self, pages: RangeSet) -> None:
        """Unplug one memory device. `pages` are all pages of this device, and the guest does not
        use them any more. `ram` is not changed.

        :raises hintfleet.errors.Refused: the guest refused to release it, libvirt failed, or the
            guest is attached; nothing has changed.
        :raises hintfleet.errors.OutcomeUnknown: the guest did not answer in time, and may still
            release it.
        """

    def evidence(self) -> str:
        """Return the last lines of the guest's console or log, or why there are none; empty for an
        attached guest."""

    def close(self) -> None:
        """End the guest and free all that it held: process, domain, memory, files. The domain of
        an attached guest is not ended: only the memory door is taken out of it.

        May be called again, and after the guest has ended by itself.

        :raises hintfleet.errors.HintfleetError: the guest could not be ended, or the door could not
            be taken out. Then nothing is freed, except RAM that QEMU does not share any more.
        """


class GuestMaker(Protocol):
    """Makes or attaches one driver's guests. Methods may block: call them from worker threads."""

    def create(self, request: GuestRequest) -> RunningGuest:
        """Start or attach a guest; do not wait for its agent to connect. After a failure nothing is
        left, except an embedded guest's log under Survival, and a memory door that an attached
        guest did not release.

        :raises hintfleet.errors.Refused: this host cannot run it; says why.
        :raises hintfleet.errors.InvalidInput: a setting is out of its bounds.
        :raises hintfleet.errors.GuestLost: it ended, or did not become usable in time.
        :raises hintfleet.errors.OutcomeUnknown: an attached guest did not release the door of an
            earlier host agent in time.
        :raises OSError: for example, there is no free descriptor, process or disk space.
        """

    def adopt(self, request: GuestRequest, handle: Handle) -> RunningGuest:
        """Take over a guest that an earlier host agent made or attached from an equal request. A
        failure does not end the guest.

        Call it only under Survival, and only if no other host agent can work on the guest.

        :raises hintfleet.errors.GuestLost: it is gone, or it does not accept a new memory door. For
            an attached guest, also instead of Refused.
        :raises hintfleet.errors.Refused: this host agent cannot find out whether it is gone, or
            cannot open the guest's memory or sockets.
        :raises OSError: the guest's folder or log cannot be opened, or no descriptor is free.
        """

    def close(self) -> None:
        """Close the connection to libvirt, if there is one. The caller must have closed all guests,
        except those that survive the host agent."""


class Attacher(GuestMaker, Protocol):
    """Attaches domains of somebody else, which end and start when their operators want."""

    def has_ended(self, uuid_text: str, handle: Handle) -> bool:
        """Return whether a domain whose door is disconnected has ended. If not, somebody has taken
        the door out, or its connection failed. Wait up to 10 s for libvirt to notice the end.

        :param handle: the handle of the guest that was attached.
        :raises hintfleet.errors.Refused: libvirt does not answer.
        """

    def runs(self, uuid_text: str) -> bool:
        """Return whether a domain runs, or is suspended, now.

        :raises hintfleet.errors.GuestLost: there is no such domain.
        :raises hintfleet.errors.Refused: libvirt does not answer.
        """


class GuestDriver(GuestMaker, Protocol):
    """Makes the guests of trials; attaches no domains."""

    def state(self) -> host_pb2.DriverState:
        """Return whether this host can run such guests, and with what, or why not."""

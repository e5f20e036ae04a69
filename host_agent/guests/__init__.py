"""Guests of a host, whatever they are: what a driver makes and the service uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hintfleet.v1 import host_pb2
from host_agent.balloon import Balloon
from host_agent.ram import GuestRam


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
    """A guest that runs; owned by whoever called `create`.

    :ivar balloon: to be moved by the owner; None except under method BALLOON.
    """

    pid: int
    ram: GuestRam
    balloon: Balloon | None

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

    def close(self) -> None:
        """Let go of connections. Guests must have been closed before."""

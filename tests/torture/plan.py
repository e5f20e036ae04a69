"""Decides which faults are injected, and when, from a seed. Pure: no clock, no process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

_ONE_IN = 50


class Kind(Enum):
    """The kind of a fault in a guest, its link, its host agent or its libvirtd."""

    GUEST_KILLED = "guest killed"
    """kill -9 of QEMU, or of an embedded guest, which is one process with its agent."""
    GUEST_RESET = "guest reset"
    """By libvirt. A guest that hintfleet made ends by it; an attached one boots again."""
    GUEST_REBOOTED = "guest rebooted"
    """In order, from inside."""
    GUEST_REBOOTED_AT_ONCE = "guest rebooted at once"
    """From inside, by reboot(2)."""
    GUEST_SYSRQ_B = "guest reset by SysRq b"
    GUEST_PANICKED = "guest panicked"
    DOMAIN_ENDED = "domain ended and started again"
    DOOR_UNPLUGGED = "memory door unplugged by somebody else"
    DETACHED = "detached and attached again"
    SAVE_REFUSED = "save refused"
    """A domain cannot be saved while its memory door is there."""
    LIBVIRT_RESTARTED = "libvirtd killed and started again"
    GUEST_SUSPENDED = "guest suspended"
    AGENT_KILLED = "guest agent killed"
    """kill -9 of the agent alone, inside a real guest, at a step of the protocol."""
    AGENT_STOPPED = "guest agent stopped"
    """SIGTERM of the agent alone."""
    HOST_AGENT_KILLED = "host agent killed"
    HOST_AGENT_SUSPENDED = "host agent suspended"
    MEMORY_RESIZED = "memory hot-plugged or -unplugged"
    LINK_CUT = "link cut"
    LINK_STALLED = "link stalled"
    LINK_DELAYED = "link delayed"
    SESSION_REPLAYED = "session replayed"
    """What the guest sent first on a connection, 64 KiB at most, is sent again on another one."""
    SECOND_AGENT = "second agent"
    """Another client sends the same Hello and keeps the session open."""
    BOOT_ID_CHANGED = "boot id changed"
    """Another client sends a Hello for another boot of the guest."""


class Moment(Enum):
    """What a fault waits for. The wait is always bounded."""

    AT_ONCE = "at once"
    GUEST_SPEAKS = "guest speaks"
    """Data of the guest is about to be sent on to the host: a batch, for example."""
    HOST_SPEAKS = "host speaks"
    """Data of the host is about to be sent on to the guest: an ack, for example."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    :ivar pause_s: the pause before it.
    :ivar lag_s: the delay between its moment and the fault; 0: before the message passes.
    :ivar hold_s: how long it lasts, if it is a fault that lasts.
    """

    kind: Kind
    moment: Moment
    pause_s: float
    lag_s: float
    hold_s: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The longest times of a fault; they are shorter for embedded guests than for real ones.

    :ivar longest_hold_s: the longest `hold_s` of about one fault in fifty, so that some outlast
        keepalives and deadlines; 0: `hold_s` is the longest of all faults.
    """

    pause_s: float
    lag_s: float
    hold_s: float
    longest_hold_s: float = 0.0

    def hold(self, dealer: random.Random) -> float:
        """Draw how long one fault lasts, in s."""
        if self.longest_hold_s and not dealer.randrange(_ONE_IN):
            return dealer.uniform(self.hold_s, self.longest_hold_s)
        return dealer.uniform(self.hold_s / 10, self.hold_s)


def faults(seed: str, weights: Mapping[Kind, int], pace: Pace) -> Iterator[Fault]:
    """Yield faults without end, the same ones for the same arguments; none if there are no weights.

    Kinds are dealt like cards: a deck has each kind as often as its weight says, and a new deck
    begins when the old one is used up. So every kind comes soon.
    """
    dealer = random.Random(seed)
    deck = [kind for kind, weight in weights.items() for _ in range(weight)]
    while deck:
        dealer.shuffle(deck)
        for kind in deck:
            yield Fault(
                kind=kind,
                moment=dealer.choice(list(Moment)),
                pause_s=dealer.uniform(0, pace.pause_s),
                lag_s=dealer.choice((0.0, dealer.uniform(0, pace.lag_s))),
                hold_s=pace.hold(dealer),
            )

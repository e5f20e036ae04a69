"""Which faults are injected, and when: a seed in, faults out. No clock, no process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

_ONE_IN = 50


class Kind(Enum):
    """What is done to a guest, its link or its host agent."""

    GUEST_KILLED = "guest killed"
    """kill -9: of QEMU, or of an embedded guest, which is one process with its agent."""
    GUEST_RESET = "guest reset"
    GUEST_SUSPENDED = "guest suspended"
    AGENT_KILLED = "guest agent killed"
    """kill -9 of the agent alone, inside a real guest, at a step of the protocol."""
    AGENT_STOPPED = "guest agent stopped"
    """The same by SIGTERM."""
    HOST_AGENT_KILLED = "host agent killed"
    HOST_AGENT_SUSPENDED = "host agent suspended"
    MEMORY_RESIZED = "memory hot-plugged or -unplugged"
    LINK_CUT = "link cut"
    LINK_STALLED = "link stalled"
    LINK_DELAYED = "link delayed"
    SESSION_REPLAYED = "session replayed"
    """What the guest said on an earlier connection arrives once more, from Hello on."""
    SECOND_AGENT = "second agent"
    """Another one says the same Hello and stays."""
    BOOT_ID_CHANGED = "boot id changed"
    """Another one says Hello for another boot of the guest."""


class Moment(Enum):
    """What a fault waits for. There is always a bound on the wait."""

    AT_ONCE = "at once"
    GUEST_SPEAKS = "guest speaks"
    """Something of the guest is about to reach the host: a batch, if it is hinting."""
    HOST_SPEAKS = "host speaks"
    """Something of the host is about to reach the guest: an ack, if it is hinting."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    :ivar pause_s: quiet time before it.
    :ivar lag_s: how long after its moment it strikes; 0 for before anything passes.
    :ivar hold_s: how long it lasts, where it is something that lasts.
    """

    kind: Kind
    moment: Moment
    pause_s: float
    lag_s: float
    hold_s: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long things take at the most: an embedded guest lives faster than a real one.

    :ivar longest_hold_s: for one fault in fifty, which outlasts keepalives and deadlines; 0
        for none.
    """

    pause_s: float
    lag_s: float
    hold_s: float
    longest_hold_s: float = 0.0

    def hold(self, dealer: random.Random) -> float:
        """How long one fault lasts."""
        if self.longest_hold_s and not dealer.randrange(_ONE_IN):
            return dealer.uniform(self.hold_s, self.longest_hold_s)
        return dealer.uniform(self.hold_s / 10, self.hold_s)


def faults(seed: str, weights: Mapping[Kind, int], pace: Pace) -> Iterator[Fault]:
    """An endless sequence of faults, the same for the same arguments.

    Kinds are dealt like cards, each as often as its weight says before any comes again
    more often: so all of them are met soon.
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

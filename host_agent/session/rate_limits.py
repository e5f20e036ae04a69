"""What a guest may ask of this host in a given time, and what comes of asking for more.

Pure: clocks are handed in. A guest that breaks the protocol is told why and loses that
stream; one that floods is read no faster than its pace, and told why if it goes on; one
that does either again and again is kept out for a while, then dropped for good.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hintfleet.errors import HintfleetError, LimitExceeded


@dataclass(frozen=True, kw_only=True)
class Rate:
    """So many a second in the long run, and so many at once."""

    per_s: float
    burst: int


BATCHES = Rate(per_s=300, burst=250)
"""Of one guest, where every 32 ranges count as one more: what a batch costs here grows with
them. One that is full of single chunks counts 5, so 60 of those a second: 15 GiB at order 9,
which no host punches. An honest guest waits for acks, so this is no violation."""

RANGE_BYTES = 2
RANGES_AS_A_BATCH = 32

MESSAGES = Rate(per_s=50, burst=50)
"""Of one guest, other than batches. An honest one sends telemetry once a second, and answers."""

SESSIONS = Rate(per_s=5, burst=50)
"""Streams that one guest opens. An agent pauses for 2 s before long if it fails."""

STREAMS = 16
"""Of one guest at a time, those included that ended but are not read to their end."""

FLOOD_S = 5.0
"""A guest whose messages were held back for so long without a pause floods."""

STRIKES = 5
STRIKES_WITHIN_S = 60.0
"""So many violations within so long, and the guest is kept out."""

BANS_S = (10.0, 60.0, math.inf)
"""For how long, the first, second and last time."""


class TokenBucket:
    """A token bucket, kept as what was taken out of it and has not come back yet."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._taken = 0.0
        self._at_s = -math.inf
        self._held_since_s = math.inf

    def take(self, now_s: float, tokens: float = 1) -> float:
        """Use tokens, there or not; how long to wait before the next may be, 0 mostly."""
        self._refill(now_s)
        self._taken += tokens
        wait_s = max(0.0, self._taken - self._rate.burst) / self._rate.per_s
        self._held_since_s = min(self._held_since_s, now_s) if wait_s else math.inf
        return wait_s

    def take_if_there(self, now_s: float) -> bool:
        """Use a token if there is one."""
        self._refill(now_s)
        there = self._taken <= self._rate.burst - 1
        self._taken += there
        return there

    def _refill(self, now_s: float) -> None:
        self._taken = max(0.0, self._taken - (now_s - self._at_s) * self._rate.per_s)
        self._at_s = now_s

    def held_for_s(self, now_s: float) -> float:
        """For how long every `take` has had to wait; 0 if the last one had not."""
        return max(0.0, now_s - self._held_since_s)


class Conduct:
    """How one guest has behaved.

    :ivar violations: how often it broke a rule.
    """

    def __init__(self) -> None:
        self.violations = 0
        self._last = ""
        self._open_streams = 0
        self._strikes: deque[float] = deque(maxlen=STRIKES)
        self._bans = 0
        self._banned_until_s = -math.inf
        self._batches = TokenBucket(BATCHES)
        self._messages = TokenBucket(MESSAGES)
        self._sessions = TokenBucket(SESSIONS)

    def may_open(self, now_s: float) -> None:
        """The guest opens a stream.

        :raises LimitExceeded: it must not, or not yet; says why.
        """
        if now_s < self._banned_until_s:
            raise LimitExceeded(f"kept out for {self._banned_until_s - now_s:.0f} s: {self}")
        if self._open_streams >= STREAMS:
            raise LimitExceeded(f"{STREAMS} streams are open, or never read to their end")
        if not self._sessions.take_if_there(now_s):
            raise LimitExceeded(f"more than {SESSIONS.per_s:g} streams opened per second")

    def opened(self) -> Callable[[], None]:
        """The guest has opened a stream; to be called when it is closed."""
        self._open_streams += 1

        def closed() -> None:
            self._open_streams -= 1

        return closed

    def heard_batch(self, size_bytes: int, now_s: float) -> float:
        """The guest sent a batch; how long to wait before its next message is read."""
        return self._batches.take(now_s, 1 + size_bytes // RANGE_BYTES // RANGES_AS_A_BATCH)

    def made_work(self, pieces: int, now_s: float) -> None:
        """A batch met memory that was cut up into so many more pieces than it had ranges. They
        count like ranges, and have its successors wait."""
        self._batches.take(now_s, max(0, pieces) / RANGES_AS_A_BATCH)

    def heard(self, now_s: float) -> float:
        """The guest sent another message; how long to wait before the next is read.

        :raises LimitExceeded: it floods.
        """
        wait_s = self._messages.take(now_s)
        if self._messages.held_for_s(now_s) > FLOOD_S:
            raise LimitExceeded(
                f"more than {MESSAGES.per_s:g} messages per second for {FLOOD_S:g} s"
            )
        return wait_s

    def violated(self, error: HintfleetError, now_s: float) -> bool:
        """The guest broke a rule; whether it is to be dropped for good."""
        self.violations += 1
        self._last = error.message
        self._strikes.append(now_s)
        if len(self._strikes) < STRIKES or now_s - self._strikes[0] > STRIKES_WITHIN_S:
            return False
        self._strikes.clear()
        self._banned_until_s = now_s + BANS_S[self._bans]
        self._bans += 1
        return self._banned_until_s == math.inf

    def banned(self, now_s: float) -> bool:
        """Whether the guest is kept out now."""
        return now_s < self._banned_until_s

    def __str__(self) -> str:
        """For people; empty if there is nothing to say."""
        if not self.violations:
            return ""
        return f"broke the protocol {self.violations} times, the last: {self._last}"

"""Rate limits and bans: how much a guest may ask of this host, and what happens if it asks more.

Pure: the caller passes the time. If a guest breaks the protocol, the stream on which it did so is
ended, with the reason. If a guest sends more than its rate limits, its messages are read more
slowly; if it continues for 5 s with messages other than batches, the stream is ended, too. Each
such end of a stream counts as a violation. A guest with too many violations is banned for a while;
the third ban is for ever. New streams of a guest that is banned, or that opens too many, are
refused; a refusal is not a violation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hintfleet.errors import HintfleetError, LimitExceeded


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate limit: `per_s` in the long run, and `burst` at once."""

    per_s: float
    burst: int


# Batches of one guest. Every 32 ranges count as one batch more, because they cost the host that
# much. A batch full of single chunks counts as 5, so a guest may send 60 of those per second: 15
# GiB/s at order 9, more than a host punches. To be slowed by this limit is not a violation.
BATCHES = Rate(per_s=300, burst=250)
RANGE_BYTES = 2  # size of a typical range on the wire
RANGES_AS_A_BATCH = 32

# Messages of one guest other than batches. An honest guest sends only answers to requests, and
# telemetry at most once per second.
MESSAGES = Rate(per_s=50, burst=50)

# Streams that one guest opens. An agent whose streams fail pauses longer after each, up to 2 s.
SESSIONS = Rate(per_s=5, burst=50)

# Open streams of one guest at a time. Streams that have ended, but that the guest has not read to
# their end, count as well, because they use memory of this process.
STREAMS = 16

# A guest floods if, for longer than this, all of its messages but batches were delayed.
FLOOD_S = 5.0

# A guest is banned after this number of violations within this time.
VIOLATIONS_BEFORE_BAN = 5
VIOLATIONS_WITHIN_S = 60.0

# How long the first, second and third ban for violations last.
BANS_S = (10.0, 60.0, math.inf)


class TokenBucket:
    """A token bucket. It counts the tokens that were taken and are not refilled yet."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._taken = 0.0
        self._at_s = -math.inf
        self._held_since_s = math.inf

    def take(self, now_s: float, tokens: float = 1) -> float:
        """Take tokens, even if there are too few; return how long to wait before the next call,
        in seconds. The wait is 0 while there are enough."""
        self._refill(now_s)
        self._taken += tokens
        wait_s = max(0.0, self._taken - self._rate.burst) / self._rate.per_s
        self._held_since_s = min(self._held_since_s, now_s) if wait_s else math.inf
        return wait_s

    def take_if_there(self, now_s: float) -> bool:
        """Take a token if there is one; return whether there was."""
        self._refill(now_s)
        there = self._taken <= self._rate.burst - 1
        self._taken += there
        return there

    def _refill(self, now_s: float) -> None:
        self._taken = max(0.0, self._taken - (now_s - self._at_s) * self._rate.per_s)
        self._at_s = now_s

    def held_for_s(self, now_s: float) -> float:
        """Return for how long, up to now, every `take` has returned a wait, in seconds; 0 if the
        last one returned 0."""
        return max(0.0, now_s - self._held_since_s)


class Conduct:
    """How one guest behaves: its rate limits, violations and bans.

    :ivar violations: how often it broke a rule.
    """

    def __init__(self) -> None:
        self.violations = 0
        self._last = ""
        self._open_streams = 0
        self._recent_violations: deque[float] = deque(maxlen=VIOLATIONS_BEFORE_BAN)
        self._bans = 0
        self._banned_until_s = -math.inf
        self._batches = TokenBucket(BATCHES)
        self._messages = TokenBucket(MESSAGES)
        self._sessions = TokenBucket(SESSIONS)

    def check_may_open(self, now_s: float) -> None:
        """Check that the guest may open a stream now, and count this stream for the rate limit.

        :raises LimitExceeded: the guest is banned, has too many open streams, or opens them too
            fast. This is not a violation.
        """
        if now_s < self._banned_until_s:
            raise LimitExceeded(f"banned for {self._banned_until_s - now_s:.0f} s: {self}")
        if self._open_streams >= STREAMS:
            raise LimitExceeded(f"{STREAMS} streams are open, or were not read to their end")
        if not self._sessions.take_if_there(now_s):
            raise LimitExceeded(f"more than {SESSIONS.per_s:g} streams opened per second")

    def count_stream(self) -> Callable[[], None]:
        """Count one more open stream of the guest; return a function to call when it is closed."""
        self._open_streams += 1

        def closed() -> None:
            self._open_streams -= 1

        return closed

    def count_batch(self, size_bytes: int, now_s: float) -> float:
        """Count a batch; return how long to wait before reading on, in seconds.

        :param size_bytes: size of the batch's packed ranges.
        """
        return self._batches.take(now_s, 1 + size_bytes // RANGE_BYTES // RANGES_AS_A_BATCH)

    def count_pieces(self, pieces: int, now_s: float) -> None:
        """Count pieces of memory as `count_batch` counts ranges, so that later batches wait.

        :param pieces: how many more runs of reclaimed or absent pages a batch had than ranges; a
            negative number counts as 0. If only every second page of a range was in use, each of
            its pages is such a run.
        """
        self._batches.take(now_s, max(0, pieces) / RANGES_AS_A_BATCH)

    def count_message(self, now_s: float) -> float:
        """Count a message other than a batch; return how long to wait before reading on, in
        seconds.

        :raises LimitExceeded: the guest floods.
        """
        wait_s = self._messages.take(now_s)
        if self._messages.held_for_s(now_s) > FLOOD_S:
            raise LimitExceeded(
                f"more than {MESSAGES.per_s:g} messages per second for {FLOOD_S:g} s"
            )
        return wait_s

    def count_violation(self, error: HintfleetError, now_s: float) -> bool:
        """Count a violation, and ban the guest if it was one too many. Return whether this has
        banned the guest for ever: then the caller must drop it."""
        self.violations += 1
        self._last = error.message
        self._recent_violations.append(now_s)
        if (
            len(self._recent_violations) < VIOLATIONS_BEFORE_BAN
            or now_s - self._recent_violations[0] > VIOLATIONS_WITHIN_S
        ):
            return False
        self._recent_violations.clear()
        # `min`, because streams that were open when the third ban began may cause a fourth one.
        self._banned_until_s = now_s + BANS_S[min(self._bans, len(BANS_S) - 1)]
        self._bans += 1
        return self._banned_until_s == math.inf

    def is_banned(self, now_s: float) -> bool:
        """Return whether the guest is banned now."""
        return now_s < self._banned_until_s

    def __str__(self) -> str:
        """Describe the violations, for people; empty if there are none."""
        if not self.violations:
            return ""
        return f"broke the protocol {self.violations} times, last: {self._last}"

"""Turns off the rate limits and bans of a host agent in this process, for tests that break rules
all the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from host_agent.api import guest_service
from host_agent.session import rate_limits

_PLENTY = 1 << 30


@contextlib.contextmanager
def no_rate_limits() -> Iterator[None]:
    """In this block, ban no guest, limit no guest's open streams, and make no pause before a stream
    is refused. Guests that are added in the block have no rate limits."""
    plenty = rate_limits.Rate(per_s=_PLENTY, burst=_PLENTY)
    with (
        mock.patch.multiple(rate_limits, VIOLATIONS_BEFORE_BAN=_PLENTY, STREAMS=_PLENTY),
        mock.patch.multiple(rate_limits, SESSIONS=plenty, MESSAGES=plenty, BATCHES=plenty),
        mock.patch.object(guest_service, "_REFUSAL_S", 0.0),
    ):
        yield

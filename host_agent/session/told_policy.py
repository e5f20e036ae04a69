"""The policy that one guest is told, and pauses of its hinting.

A pause is only a policy that allows nothing: it changes nothing for batches, acks and the fence. So
chunks that are isolated when the pause begins are still hinted, acknowledged and released, and a
Settle during the pause is answered with nothing hinted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from hintfleet.logs import fields
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.session.messages import nothing_allowed, policy_of

_log = logging.getLogger("hintfleet.host.session")


class ToldPolicy:
    """What a guest is told about when to hint: its policy; during a pause, one that allows
    nothing."""

    def __init__(
        self,
        guest_name: str,
        settings: host_pb2.HintingSettings,
        tell: Callable[[pb.Policy], None],
    ) -> None:
        """:param tell: sends a policy to the guest, if it has a session."""
        self._name = guest_name
        self._settings = settings
        self._tell = tell
        self._own = policy_of(settings)
        """The guest's policy outside of a pause, with its present allowance and patience."""
        self._pause_timer: asyncio.TimerHandle | None = None
        self._paused_until_s = 0.0
        self._rests = False
        """Whether the guest was told to rest, and has begun no session since."""

    def update(self, *, allowance_bytes: int = 0, patience: float = 1.0) -> None:
        """Tell the guest its policy as it is now, if the policy has changed or has an allowance
        (policy pressure). During a pause, the guest is told only when the pause ends, and without
        the allowance; after `rest`, not before a new session."""
        policy = policy_of(self._settings, allowance_bytes=allowance_bytes, patience=patience)
        # Nothing allowed is the normal case: it is not sent again in each period.
        if policy.allowance_pages or policy != self._own:
            self._own = policy
            if self._pause_timer is None and not self._rests:
                self._tell(policy)

    def of_new_session(self) -> pb.Policy:
        """Return the policy with which a session begins."""
        self._own.allowance_pages = 0  # what was allowed was for the session before
        self._rests = False
        return self._now()

    def rest(self) -> None:
        """Tell the guest to hint no more, until a new session begins."""
        self._rests = True
        self._tell(nothing_allowed(self._own))

    def pause(self, for_s: float) -> float:
        """Allow nothing for a time, instead of what is left of an earlier pause. The new pause ends
        by itself.

        :param for_s: 0 ends the pause.
        :returns: how long the earlier pause would still have lasted, in seconds; 0 if there was
            none.
        """
        left_s, before = self.pause_left_s, self._pause_timer
        self._cancel_timer()
        if for_s:
            self._paused_until_s = time.monotonic() + for_s
            loop = asyncio.get_running_loop()
            self._pause_timer = loop.call_later(for_s, self.pause, 0.0)
        if (before is None) != (self._pause_timer is None):
            about = fields(guest=self._name)
            _log.info("hinting paused" if for_s else "hinting goes on", extra=about)
            self._own.allowance_pages = 0  # what was allowed was for the time before
            if not self._rests:
                self._tell(self._now())
        return left_s

    @property
    def pause_left_s(self) -> float:
        """How long the pause will last, in seconds, unless it is renewed; 0 if there is none."""
        if self._pause_timer is None:
            return 0.0
        # The timer may be late: until it runs, the guest is still paused.
        return max(0.001, self._paused_until_s - time.monotonic())

    def close(self) -> None:
        """End the pause of a guest that is gone."""
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None

    def _now(self) -> pb.Policy:
        return self._own if self._pause_timer is None else nothing_allowed(self._own)

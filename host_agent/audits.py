"""Decides when one guest's RAM is audited, and when the guest is told of refaults: each when it is
due or asked for, the one without the other, too."""

from __future__ import annotations

import asyncio

from hintfleet.v1 import host_pb2
from host_agent.cpu_meter import CpuMeter
from host_agent.memory.audit_pace import AuditPace, Pace
from host_agent.memory.guest_memory import GuestMemory
from host_agent.session.guest_sessions import GuestSessions
from host_agent.tasks import LastingTasks

# The audits that `check` starts for a guest that does not hint serve samples and metrics only. So
# they take at most 1 % of a processor for each guest in the long run.
_OBSERVING = Pace(period_s=1.0, share=1 / 100)

# Share of a processor that the audits that `check` starts for a hinting guest may take in the long
# run: more than for other guests, because a hinting guest is told what they find.
_TELLING_SHARE = 1 / 20


class Audits:
    """Decides when one guest is audited, and when the guest is told of refaults."""

    def __init__(
        self,
        memory: GuestMemory,
        sessions: GuestSessions,
        tasks: LastingTasks,
        *,
        report_period_s: float | None,
        observing: CpuMeter,
    ) -> None:
        """:param report_period_s: shortest time between two messages about refaults that `check`
            starts; None for a guest that does not hint.
        :param observing: counts the processor time of the audits that `check` starts for a guest
            that does not hint: they serve samples and metrics only.
        """
        self._memory = memory
        self._sessions = sessions
        self._tasks = tasks
        self._hints = report_period_s is not None
        self._report_period_s = report_period_s or _OBSERVING.period_s
        telling_period_s = min(self._report_period_s, _OBSERVING.period_s)
        telling = Pace(period_s=telling_period_s, share=_TELLING_SHARE)
        self._pace = AuditPace(telling if self._hints else _OBSERVING)
        self._observing = observing
        self._task: asyncio.Task[None] | None = None
        self._next_tell_s = 0.0

    @property
    def next_check_s(self) -> float:
        """The time of the monotonic clock at which the next `check` is due."""
        return self._pace.next_check_s

    def check(self, now_s: float) -> None:
        """Start an audit, a message about refaults to the guest, or both, if they are due; neither
        while the work of an earlier check runs. Set `next_check_s`."""
        busy = self._task is not None and not self._task.done()
        # While earlier work runs, pass 0 moved pages: else the pace could note a look as begun now,
        # though none begins.
        look = self._pace.check(now_s, 0 if busy else self._memory.moved_pages())
        tell = self._sessions.has_refaults_to_tell and now_s >= self._next_tell_s
        if (look or tell) and not busy:
            self._task = self._tasks.begin(self._memory.run_locked(self._check(look, now_s)))

    async def _check(self, look: bool, now_s: float) -> None:
        if look:
            took_s = await self._memory.look()
            self._pace.looked(took_s)
            if not self._hints:
                self._observing.add(took_s)
        if now_s >= self._next_tell_s:
            self._next_tell_s = now_s + self._report_period_s
            await self._sessions.tell_refaults()

    async def ledger(self) -> host_pb2.Ledger:
        """Audit in full: enter all that the RAM files show. Return the books."""
        return await self._tasks.finish(self._memory.run_locked(self._memory.audit()))

    async def tell_refaults(self) -> None:
        """Audit in full, then report refaults to the guest, if there are any and it has a session
        (`GuestSessions.tell_refaults`)."""
        await self._tasks.finish(self._memory.run_locked(self._audit_and_tell()))

    async def _audit_and_tell(self) -> None:
        await self._memory.audit()
        await self._sessions.tell_refaults()

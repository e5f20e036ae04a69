"""One guest of this host, from the moment it is asked for until its books are closed.

Its RAM, books and audits are in `memory`, what its agent says in `sessions`; here is its life,
and what needs both. Everything runs on the host agent's event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence

from hintfleet.errors import GuestLost, HintfleetError
from hintfleet.logs import fields
from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.audits import Audits
from host_agent.cpu_meter import CpuMeter
from host_agent.guests.driver import RunningGuest
from host_agent.guests.peer import PEERS, Peer
from host_agent.memory.guest_memory import GuestMemory
from host_agent.memory.ledger import Books
from host_agent.memory.ram import Segment
from host_agent.persistence.database import GuestRecord
from host_agent.persistence.saver import Saver
from host_agent.session.guest_sessions import GuestSessions
from host_agent.session.messages import policy_of
from host_agent.session.validation import printable
from host_agent.tasks import LastingTasks
from host_agent.threads import in_driver_thread

# The kernel's PAGE_REPORTING_DELAY is 2 s, and a balloon's step takes as long: after two
# of them without any effect there is nothing more to come.
_QUIET_S = 4.5
_QUIET_POLL_S = 0.1
_NOISE_BYTES = 1 << 20

_log = logging.getLogger("hintfleet.host.guest")


class Guest:
    """A guest; made by `started` or `adopted`, ended by `close` or `leave`."""

    def __init__(
        self,
        *,
        name: str,
        uuid: str,
        token: str,
        trial_id: str,
        spec: host_pb2.GuestSpec,
        saver: Saver | None = None,
        observing: CpuMeter | None = None,
    ) -> None:
        """:param saver: told of all that `record` would tell differently.
        :param observing: where audits are entered that serve nothing but samples and metrics.
        """
        self.name = name
        self.uuid = uuid
        self.token = token
        self.trial_id = trial_id
        self.spec = spec
        self.saver = saver or Saver(None)
        self.running: RunningGuest | None = None
        self.creation: asyncio.Task[None] | None = None
        """Ends with `running` set, or with what kept it from being made."""
        self.resize_lock = asyncio.Lock()
        """Held while memory is on its way in or out."""
        self.tasks = LastingTasks(self._failed)
        self.memory = GuestMemory(
            name,
            others_reclaim=spec.method in PEERS,
            changed=lambda: self.saver.changed(self),
            lost=self.lost,
        )
        self.sessions = GuestSessions(
            name, spec.hinting, self.memory, self.tasks, opened=self._note_ready
        )
        self._hints = spec.method == host_pb2.HINTING
        report_period_s = policy_of(spec.hinting).report_period_ms / 1000
        self.audits = Audits(
            self.memory,
            self.sessions,
            self.tasks,
            report_period_s=report_period_s if self._hints else None,
            observing=observing or CpuMeter(),
        )
        self._peer = Peer(spec)
        self._ready = asyncio.Event()
        self._lost: str | None = None

    # Life

    def started(self, running: RunningGuest) -> None:
        """Take what the driver has made; its RAM is untouched or nearly so."""
        self.memory.started(running.ram)
        self._own(running)
        _log.info("guest made", extra=self._fields(pid=running.pid))

    async def adopted(self, running: RunningGuest, books: Books) -> None:
        """Take what the driver has found again, with the books of an earlier host agent."""
        self.memory.plugged_pages = await in_driver_thread(running.plugged)
        await asyncio.to_thread(self.memory.recovered, running.ram, books)
        self._own(running)
        _log.info("guest adopted", extra=self._fields(pid=running.pid))

    def _own(self, running: RunningGuest) -> None:
        self.running = running
        self.saver.changed(self)
        self._peer.start(
            running,
            self.sessions.workload_is_there,
            seen=self._note_ready,
            stirred=self.memory.stirred,
            failed=self.lost,
        )

    def lost(self, reason: str) -> None:
        """Enter that the guest is gone: its epoch ends now, and whoever waits for it hears why."""
        if self._lost is not None:
            return
        self._lost = reason
        _log.log(
            logging.INFO if reason == _DESTROYED else logging.WARNING,
            "guest ended" if reason == _DESTROYED else "guest lost",
            extra=self._fields(epoch=self.sessions.epoch, reason=reason),
        )
        self.sessions.end_all(GuestLost(f"guest {self.name}: {reason}"))
        self._ready.set()

    def _failed(self, error: BaseException) -> None:
        """Give up a guest on whose memory or session nobody works any more."""
        _log.error("work on a guest failed", extra=self._fields(), exc_info=error)
        self.lost(f"the host agent failed on it: {type(error).__name__}: {error}")

    def _note_ready(self) -> None:
        works = self._peer.works and (not self._hints or self.sessions.is_welcome)
        if self.sessions.has_workload and works:
            self._ready.set()

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest's agent is attached, and its method at work: welcomed if it
        hints, and under a peer heard of by the hypervisor.

        :raises GuestLost: the guest ended, did not attach in time, or its method cannot work.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            unseen = self.sessions.has_workload and not self._hints
            late = "see its method at work" if unseen else "attach"
            raise GuestLost(
                f"guest {self.name}: its agent did not {late} within {timeout_s:.0f} s"
            ) from None
        self._check_alive()

    async def close(self) -> host_pb2.Ledger:
        """End the guest, free all that it held, and return its closed books. Repeatable. One
        that is being made cannot be called back: that is waited for.

        :raises HintfleetError: the driver could not end it. It is `lost` all the same.
        """
        if self.creation is not None:
            await asyncio.wait([self.creation])
        await self.audits.ledger()
        self.lost(_DESTROYED)
        await self._peer.stop()
        async with self.resize_lock:
            await self.tasks.finish(self.memory.run_alone(self._end()))
        return self.memory.last_ledger

    async def _end(self) -> None:
        if self.running is not None:
            self.memory.closed()
            await in_driver_thread(self.running.close)
            self.running = None

    async def leave(self) -> None:
        """Let go of the guest, which lives on. What runs on its RAM is waited for, and
        nothing will run any more: the next host agent may be about to begin (I2).

        :raises TransientError: the state cannot be written; it is let go of all the same.
        """
        await self._peer.stop()
        async with self.resize_lock, self.memory.alone:
            try:
                await self.saver.save(self)
            finally:
                self.memory.closed()
                self.running = None

    def misbehaved(self, error: HintfleetError) -> None:
        """Count a rule that the guest broke. One that does so over and over is given up."""
        conduct = self.sessions.conduct
        _log.warning("guest broke the protocol", extra=self._fields(reason=error.message))
        if conduct.violated(error, time.monotonic()):
            self.lost(f"dropped: it {conduct}")

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise GuestLost(f"guest {self.name}: {self._lost}")

    # Facts

    def accepts(self, token: str) -> bool:
        """Return whether a stream that bears this token comes from this guest."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    @property
    def most_memory_bytes(self) -> int:
        """What it can have, all that can be plugged in included."""
        return max(self.spec.memory_bytes, self.spec.max_memory_bytes)

    @property
    def provisioned_bytes(self) -> int:
        """What the guest has now, or is to start with."""
        return self.running.ram.provisioned_bytes if self.running else self.spec.memory_bytes

    def evidence(self) -> str:
        """Return the last lines of the guest's console or log, and how it behaved."""
        said = printable(self.running.evidence()) if self.running else ""
        return "\n".join(filter(None, (said, str(self.sessions.conduct))))

    def record(self) -> GuestRecord | None:
        """Return what an adopting host agent needs; None while there is nothing to adopt."""
        books = self.memory.books()
        if self.running is None or books is None:
            return None
        return GuestRecord(
            name=self.name,
            uuid=self.uuid,
            token=self.token,
            trial_id=self.trial_id,
            spec=self.spec,
            handle=self.running.handle,
            epoch=self.sessions.epoch,
            books=books,
        )

    async def as_pb2(self) -> host_pb2.Guest:
        """Return what the control API says of this guest, its books audited now."""
        return host_pb2.Guest(
            name=self.name,
            uuid=self.uuid,
            trial_id=self.trial_id,
            spec=self.spec,
            epoch=self.sessions.epoch,
            ledger=await self.audits.ledger(),
            pid=self.running.pid if self.running else 0,
        )

    # Memory

    async def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Enter memory that the driver has plugged; returns which pages came."""
        async with self.memory.alone:
            return self.memory.plugged(segments)

    async def unplugged(self, pages: RangeSet) -> None:
        """Drop memory that the driver has unplugged, and take it out of the books. A batch
        that names it from now on finds it outside the RAM (I3).

        :raises Refused: the host's kernel would not drop it; it is in the books still.
        """
        await self.tasks.finish(self.memory.run_alone(self.memory.unplugged(pages)))

    async def settle(self) -> hinting_pb2.Settled:
        """Have the guest report now; return when all that it can hint is acknowledged.

        The peers cannot be asked: under them, return when nothing leaves the RAM any more.

        :raises GuestLost: it is gone.
        :raises TransientError: it has no hinting session now.
        """
        if self.spec.method in PEERS:
            await self._quiet()
            return hinting_pb2.Settled()
        await self.audits.tell_refaults()
        return await self.sessions.settle()

    async def _quiet(self) -> None:
        lowest_bytes = self.memory.books_now().resident_bytes
        since_s = time.monotonic()
        while time.monotonic() - since_s < _QUIET_S:
            await asyncio.sleep(_QUIET_POLL_S)
            self._check_alive()
            resident_bytes = self.memory.books_now().resident_bytes
            if resident_bytes < lowest_bytes - _NOISE_BYTES:
                lowest_bytes, since_s = resident_bytes, time.monotonic()

    def _fields(self, **more: object) -> dict[str, dict[str, object]]:
        return fields(guest=self.name, trial=self.trial_id, **more)


_DESTROYED = "destroyed"

"""One guest of this host, from the request for it until its books are closed or it is left to the
next host agent.

A `Guest` has its RAM and books in `memory`, the streams of its agent and workload in `sessions`,
and its audits in `audits`. This module begins, ends and releases guests, and does the work that
needs both `memory` and `sessions`. All methods are called on the host agent's event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
import uuid
from collections.abc import Iterable, Sequence

from hintfleet.errors import GuestLost, HintfleetError, InvalidInput, Refused
from hintfleet.logs import fields
from hintfleet.ranges import RangeSet
from hintfleet.settings import MOST_PAUSE_MS
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.audits import Audits
from host_agent.cpu_meter import CpuMeter
from host_agent.guests.driver import RunningGuest
from host_agent.guests.peer import PEERS, Peer
from host_agent.guests.process_memory import ProcessMemory
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

# A peer has finished if no memory leaves the RAM for this time, a little more than two of its
# steps: free page reporting waits 2 s between its passes (PAGE_REPORTING_DELAY,
# mm/page_reporting.c), and a step of the balloon takes about as long.
_QUIET_S = 4.5
_QUIET_POLL_S = 0.1
# A guest at rest frees and uses some memory all the time: up to 1 MiB less is not counted as
# memory that has left the RAM.
_NOISE_BYTES = 1 << 20

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_MAX_NAME_LENGTH = 64

_log = logging.getLogger("hintfleet.host.guest")


class Guest:
    """A guest. It begins with `started` or `adopted`; `close` ends it, or `leave` releases it."""

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
        """:param saver: stores what `record` returns, soon after each change of the books. None:
            nothing is stored.
        :param observing: counts the processor time of audits that serve samples and metrics only.
        """
        self.name = name
        self.uuid = uuid
        self.token = token
        self.trial_id = trial_id
        self.spec = spec
        self.is_attached = spec.driver == host_pb2.ATTACHED
        """Whether its domain is somebody else's."""
        self.saver = saver or Saver(None)
        self.earlier = host_pb2.Ledger()
        """Attached guests: the closed books of earlier starts of the domain, summed."""
        self.to_attach_again: GuestRecord | None = None
        """The record of an attached guest that waits to be attached again; None for others. See
        api/attaching_again.py."""
        self.ending = False
        """Whether somebody has asked for the end of the guest: it is not attached again."""
        self.running: RunningGuest | None = None
        self.domain = ""
        """Name of its libvirt domain, once it has run; empty for an embedded guest."""
        self.creation: asyncio.Task[None] | None = None
        """The task that makes or adopts the guest. It sets `running`, unless it fails."""
        self.resize_lock = asyncio.Lock()
        """Held while the guest is resized (resizing.py), freed, ended or left."""
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
        self.process_memory = ProcessMemory()
        self._peer = Peer(spec)
        self._ready = asyncio.Event()
        self._lost: str | None = None

    # Life

    def started(self, running: RunningGuest) -> None:
        """Take over a guest that its driver has made or attached. Its books begin, with all RAM
        untouched."""
        self.memory.started(running.ram)
        self._take_over(running)
        _log.info("guest made", extra=self._fields(pid=running.pid))

    async def adopted(self, running: RunningGuest, books: Books) -> None:
        """Take over a guest of an earlier host agent, with the books that that agent stored."""
        self.memory.plugged_pages = await in_driver_thread(running.plugged)
        await asyncio.to_thread(self.memory.recovered, running.ram, books)
        self._take_over(running)
        _log.info("guest adopted", extra=self._fields(pid=running.pid))

    def _take_over(self, running: RunningGuest) -> None:
        self.running = running
        self.domain = running.domain
        self.saver.changed(self)
        if running.door is not None:
            running.door.watch(self.sessions.door_moved)
        self._peer.start(
            running,
            self.sessions.workload_is_there,
            on_works=self._note_ready,
            has_moved=self.memory.has_moved,
            failed=self.lost,
            begin=self.tasks.begin,
        )

    def lost(self, reason: str) -> None:
        """Treat the guest as gone: end its epoch, begin to end its streams, and fail all requests
        that wait for it, with the reason. Later calls do nothing."""
        if self._lost is None:
            about = {"epoch": self.sessions.epoch, "reason": reason}
            _log.warning("guest lost", extra=self._fields(**about))
            self._gone(reason)

    def _gone(self, reason: str) -> None:
        self._lost = reason
        self.sessions.end_all(GuestLost(f"guest {self.name}: {reason}"))
        self._ready.set()

    def _failed(self, error: BaseException) -> None:
        """Log a bug in the work on the guest's memory or sessions, and treat the guest as lost."""
        _log.error("work on a guest failed", extra=self._fields(), exc_info=error)
        self.lost(f"the host agent failed while working on it: {type(error).__name__}: {error}")

    def _note_ready(self) -> None:
        works = self._peer.works and (not self._hints or self.sessions.is_welcome)
        if self.sessions.has_workload and works:
            self._ready.set()

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest's workload is connected and its method works: hinting, once a
        session is welcomed; reporting, once no problem is found; the balloon, with the first
        statistics that can be used. Method none works at once.

        :raises GuestLost: the guest is gone, its method cannot work, or the wait took longer than
            `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            peer_is_late = self.sessions.has_workload and not self._hints
            what = (
                "its method did not begin to work" if peer_is_late else "its agent did not attach"
            )
            raise GuestLost(f"guest {self.name}: {what} within {timeout_s:.0f} s") from None
        self.check_alive()

    async def close(self) -> host_pb2.Ledger:
        """End the guest, free all that it held, and return its closed books. An attached domain
        lives on: only its memory door is unplugged. May be called again.

        :raises HintfleetError: the driver could not end the guest. Its streams are ended all the
            same.
        """
        # A driver's thread that makes or adopts a guest cannot be cancelled, so wait until it has
        # ended: a guest that it makes must be closed.
        if self.creation is not None:
            await asyncio.wait([self.creation])
        await self.audits.ledger()
        if self._lost is None:
            _log.info("guest ended", extra=self._fields(epoch=self.sessions.epoch))
            self._gone("destroyed")
        await self._peer.stop()
        async with self.resize_lock:
            await self.tasks.finish(self.memory.run_locked(self._end()))
        return self.memory.last_ledger

    async def _end(self) -> None:
        if self.running is not None:
            self.memory.closed()
            await in_driver_thread(self.running.close)
            self.running = None

    async def leave(self) -> None:
        """Wait until the work on the guest's RAM has ended, save the guest, and release it: it
        lives on, but this host agent does not use it any more.

        :raises TransientError: the state cannot be written; the guest is released all the same.
        """
        if self.creation is not None:  # a driver's thread cannot be cancelled
            await asyncio.wait([self.creation])
        await self._peer.stop()
        # I2: the next host agent may begin as soon as this process ends. So wait for a punch
        # that runs (it holds the lock), and prevent later punches by `closed`.
        async with self.resize_lock, self.memory.lock:
            try:
                await self.saver.save(self)
            finally:
                self.memory.closed()
                self.running = None

    def misbehaved(self, error: HintfleetError) -> None:
        """Log and count a violation of the protocol. Many violations ban the guest for a while; at
        the third ban it is treated as lost."""
        conduct = self.sessions.conduct
        _log.warning("guest broke the protocol", extra=self._fields(reason=error.message))
        if conduct.count_violation(error, time.monotonic()):
            self.lost(f"dropped: it {conduct}")

    def check_alive(self) -> None:
        """:raises GuestLost: the guest is gone."""
        if self._lost is not None:
            raise GuestLost(f"guest {self.name}: {self._lost}")

    # Facts

    def accepts(self, token: str) -> bool:
        """Return whether this is the guest's token."""
        # Not ==: how long it takes would show how much of a guessed token is right.
        return hmac.compare_digest(token.encode(), self.token.encode())

    @property
    def largest_memory_bytes(self) -> int:
        """How much memory the guest has when as much as possible is plugged, as far as this host
        agent knows: the operator of an attached guest may plug more."""
        spec = self.spec
        return max(spec.memory_bytes, spec.max_memory_bytes, self.provisioned_bytes)

    @property
    def provisioned_bytes(self) -> int:
        """Size of the guest's RAM now, resident or not; while it does not run, the start size."""
        running = self.running if has_memory(self) else None
        return running.ram.provisioned_bytes if running else self.spec.memory_bytes

    def evidence(self) -> str:
        """Return the last lines of a running guest's console or log, and a summary of its
        violations of the protocol. Either may be empty."""
        output = printable(self.running.evidence()) if self.running else ""
        return "\n".join(filter(None, (output, str(self.sessions.conduct))))

    def record(self) -> GuestRecord | None:
        """Return what the next host agent needs to adopt the guest. None if its books are not open,
        unless the guest waits to be attached again."""
        if self.to_attach_again is not None:
            return self.to_attach_again
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
            earlier=self.earlier,
        )

    @property
    def why_not_hinting(self) -> str:
        """Why no memory of the guest can be hinted now, for people; empty if it can."""
        sessions = self.sessions
        if self.to_attach_again is not None:
            return f"it is attached again when its domain runs: {self._lost}"
        if self._lost is not None:
            return self._lost
        if not self._hints:
            return f"its method is {host_pb2.Method.Name(self.spec.method).lower()}"
        if sessions.is_welcome:
            paused_s = math.ceil(sessions.policy.pause_left_s)
            return f"paused for another {paused_s} s" if paused_s else sessions.refusal
        if sessions.conduct.is_banned(time.monotonic()):
            return f"it is banned: it {sessions.conduct}"
        return sessions.why_closed

    # Memory

    async def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Add memory that the driver has plugged to the RAM and the books; return its pages.

        :raises GuestLost: the guest does not run.
        """
        async with self.memory.lock:
            return self.memory.plugged(segments)

    async def unplugged(self, pages: RangeSet) -> None:
        """Free memory that the driver has unplugged, and remove it from the RAM and the books. If
        a later batch hints it, this memory is skipped as OUTSIDE_RAM (I3).

        :raises GuestLost: the guest does not run.
        :raises Refused: the host's kernel did not free all of it; all is still in the books.
        """
        await self.tasks.finish(self.memory.run_locked(self.memory.unplugged(pages)))

    async def settle(self) -> hinting_pb2.Settled:
        """Ask the guest to hint now; return its answer when all that it can hint is acknowledged.

        Under a peer, the guest cannot be asked: return an empty answer when no memory has left the
        RAM for some seconds.

        :raises GuestLost: the guest is gone.
        :raises TransientError: no hinting session was open within some seconds, or it ended.
        :raises OutcomeUnknown: the guest answered with a message of another kind.
        """
        if self.spec.method in PEERS:
            await self._wait_until_quiet()
            return hinting_pb2.Settled()
        await self.audits.tell_refaults()
        return await self.sessions.settle()

    async def _wait_until_quiet(self) -> None:
        lowest_bytes = self.memory.books_now().resident_bytes
        since_s = time.monotonic()
        while time.monotonic() - since_s < _QUIET_S:
            await asyncio.sleep(_QUIET_POLL_S)
            self.check_alive()
            resident_bytes = self.memory.books_now().resident_bytes
            if resident_bytes < lowest_bytes - _NOISE_BYTES:
                lowest_bytes, since_s = resident_bytes, time.monotonic()

    def _fields(self, **more: object) -> dict[str, dict[str, object]]:
        return fields(guest=self.name, trial=self.trial_id, **more)


def pause_hinting(guest: Guest, for_s: float) -> float:
    """Have a guest hint nothing for a time (`ToldPolicy.pause`); 0 ends the pause.

    :returns: how long an earlier pause would still have lasted, in seconds; 0 if there was none.
    :raises InvalidInput: a pause may not be so long.
    :raises Refused: the guest's method is not hinting.
    :raises GuestLost: the guest is gone.
    """
    if for_s * 1000 > MOST_PAUSE_MS:
        raise InvalidInput(f"{for_s:.0f} s is too long a pause", hint="at most an hour")
    if guest.spec.method != host_pb2.HINTING:
        raise Refused(f"guest {guest.name} has no hinting to pause: {guest.why_not_hinting}")
    guest.check_alive()
    return guest.sessions.policy.pause(for_s)


def checked_uuid(asked: str, guests: Iterable[Guest]) -> str:
    """Return `asked` in the usual form of a UUID, or a new UUID if `asked` is empty.

    :raises InvalidInput: `asked` is not a UUID.
    :raises Refused: one of these guests has this UUID already.
    """
    try:
        found = str(uuid.UUID(asked) if asked else uuid.uuid4())
    except ValueError:
        raise InvalidInput(f"{asked!r} is not a UUID") from None
    if any(guest.uuid == found for guest in guests):
        raise Refused(f"there is a guest with UUID {found} on this host already")
    return found


def is_guest_name(name: str) -> bool:
    """Return whether a guest can have this name: 1 to 64 ASCII letters, digits and `-`."""
    return 0 < len(name) <= _MAX_NAME_LENGTH and set(name) <= _NAME_CHARACTERS


def has_memory(guest: Guest) -> bool:
    """Return whether the guest runs, and so may have memory of this host."""
    return guest.running is not None and not guest.memory.is_freed

"""One guest of this host: its memory, its books, and the streams its agent opened.

Everything here runs on the host agent's event loop. Which batches run and when a
session is welcomed (I2) is decided by the gate; its instructions are carried out here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from hintfleet.errors import GuestLost, HintfleetError, OutcomeUnknown, Refused, TransientError
from hintfleet.ranges import RangeSet, encode
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.cpu_meter import CpuMeter
from host_agent.guests.balloon import Rule
from host_agent.guests.balloon_loop import follow, wait_reporting
from host_agent.guests.driver import RunningGuest
from host_agent.memory.audit_pace import AuditPace, Pace
from host_agent.memory.guest_memory import GuestMemory
from host_agent.memory.ledger import Books
from host_agent.memory.page_map import NO_PAGES
from host_agent.memory.ram import Segment
from host_agent.memory.reclaim import Outcome
from host_agent.persistence.database import GuestRecord
from host_agent.persistence.saver import Keeper
from host_agent.resizing import resize
from host_agent.session import gate
from host_agent.session.gate import Epochs, Gate, State
from host_agent.session.messages import ack_of, policy_of, welcome_of
from host_agent.session.rate_limits import Conduct
from host_agent.session.requests import Requests
from host_agent.session.stream import Stream
from host_agent.session.validation import printable
from host_agent.threads import in_driver_thread

_T = TypeVar("_T")

_RETURN_S = 1.0
_DEFAULT_CHUNK_ORDER = 9

_PEERS = frozenset({host_pb2.REPORTING, host_pb2.BALLOON})
"""Methods that take memory out of the RAM without us."""

_OBSERVING = Pace(period_s=1.0, share=1 / 100)
"""Audits that serve samples and metrics alone."""

_FEW_SECTIONS = 16
"""The chunks of so many are encoded sooner than a thread begins with them."""

# The kernel's PAGE_REPORTING_DELAY is 2 s, and a balloon's step takes as long: after two
# of them without any effect there is nothing more to come.
_QUIET_S = 4.5
_QUIET_LOOK_S = 0.1
_NOISE_BYTES = 1 << 20


class Guest:
    """A guest from the moment it is asked for until its books are closed."""

    def __init__(
        self,
        *,
        name: str,
        uuid: str,
        token: str,
        trial_id: str,
        spec: host_pb2.GuestSpec,
        keeper: Keeper | None = None,
        observing: CpuMeter | None = None,
    ) -> None:
        """:param keeper: told of all that `record` would tell differently.
        :param observing: where audits are entered that serve nothing but samples and metrics.
        """
        self.name = name
        self.uuid = uuid
        self.trial_id = trial_id
        self.spec = spec
        self.gate = Gate()
        self.telemetry = hinting_pb2.Telemetry()
        self.conduct = Conduct()
        self.refusals: Counter[str] = Counter()
        """How often its policy allowed it nothing, by reason."""
        self._allowed_something = False
        self.running: RunningGuest | None = None
        self.making: asyncio.Task[None] | None = None
        """Ends with `running` set, or with what kept it from being made."""
        self.token = token
        self.memory = GuestMemory(
            name,
            others_reclaim=spec.method in _PEERS,
            changed=lambda: self.keeper.changed(self),
            lost=self.lost,
        )
        self._observing = observing or CpuMeter()
        self._hints = spec.method == host_pb2.HINTING
        self._report_period_s = policy_of(spec.hinting).report_period_ms / 1000
        telling = Pace(period_s=min(self._report_period_s, _OBSERVING.period_s), share=1 / 20)
        self._pace = AuditPace(telling if self._hints else _OBSERVING)
        self._audit_task: asyncio.Task[None] | None = None
        self._next_tell_s = 0.0
        self.resize_lock = asyncio.Lock()
        """Held while memory is on its way in or out."""
        self._sessions: dict[int, Stream] = {}
        self._workload: Stream | None = None
        self._workload_is_there = asyncio.Event()
        self._ready = asyncio.Event()
        self._lost: str | None = None
        self._requests = Requests()
        self._unstoppable: set[asyncio.Task[Any]] = set()
        self._peer: asyncio.Task[None] | None = None
        self._method_works = spec.method not in _PEERS
        """Whether the guest has what its method needs; of a peer that has to be seen first."""
        self.keeper = keeper or Keeper(None)

    # Life

    def started(self, running: RunningGuest) -> None:
        """The driver has made it; its RAM is untouched or nearly so."""
        self.memory.started(running.ram)
        self._own(running)

    async def adopted(self, running: RunningGuest, books: Books) -> None:
        """The driver has found it again; an earlier host agent has left these books."""
        self.memory.plugged_pages = await in_driver_thread(running.plugged)
        await asyncio.to_thread(self.memory.recovered, running.ram, books)
        self._own(running)

    def _own(self, running: RunningGuest) -> None:
        self.running = running
        self.keeper.changed(self)
        if not self._method_works:
            self._peer = asyncio.create_task(self._run_peer(running))

    async def _run_peer(self, running: RunningGuest) -> None:
        await self._workload_is_there.wait()  # a guest that boots is left alone
        try:
            if running.reporting is not None:
                await wait_reporting(running.reporting)
                self._peer_works()
            if running.balloon is not None:
                rule = Rule.of(self.spec)
                await follow(running.balloon, rule, self._peer_works, self.memory.stirred)
        except GuestLost:  # the driver says why
            pass
        except HintfleetError as error:
            name = host_pb2.Method.Name(self.spec.method).lower()
            self.lost(f"method {name} cannot work: {error}")

    def _peer_works(self) -> None:
        self._method_works = True
        self._note_ready()

    def lost(self, reason: str) -> None:
        """The guest is gone: its epoch ends now, and whoever waits for it hears why."""
        if self._lost is not None:
            return
        self._lost = reason
        error = GuestLost(f"guest {self.name}: {reason}")
        self._carry_out(self.gate.gone(error))
        if self._workload is not None:
            self._workload.end(error)
        self._requests.fail_all(error)
        self._ready.set()
        self._workload_is_there.set()  # nobody is to wait for it

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest's agent is attached, and its method at work: welcomed if it
        hints, and under a peer heard of by the hypervisor.

        :raises GuestLost: the guest ended, did not attach in time, or its method cannot work.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            late = "attach" if self._workload is None or self._hints else "see its method at work"
            raise GuestLost(
                f"guest {self.name}: its agent did not {late} within {timeout_s:.0f} s"
            ) from None
        self._check_alive()

    async def close(self) -> host_pb2.Ledger:
        """End the guest, free all that it held, and return its closed books. Repeatable. One
        that is being made cannot be called back: that is waited for.

        :raises HintfleetError: the driver could not end it. It is `lost` all the same.
        """
        if self.making is not None:
            await asyncio.wait([self.making])
        await self.ledger()
        self.lost("destroyed")
        await self._stop_peer()
        async with self.resize_lock:
            await self._with_ram(self._end())
        return self.memory.last_ledger

    async def _end(self) -> None:
        if self.running is not None:
            self.memory.closed()
            await in_driver_thread(self.running.close)
            self.running = None

    async def _stop_peer(self) -> None:
        if self._peer is not None:
            self._peer.cancel()
            await asyncio.wait([self._peer])

    async def leave(self) -> None:
        """Let go of the guest, which lives on. What runs on its RAM is waited for, and
        nothing will run any more: the next host agent may be about to begin (I2).

        :raises TransientError: the state cannot be written; it is let go of all the same.
        """
        await self._stop_peer()
        async with self.resize_lock, self.memory.alone:
            try:
                await self.keeper.save(self)
            finally:
                self.memory.closed()
                self.running = None

    def record(self) -> GuestRecord | None:
        """What an adopting host agent needs to know; None while there is nothing to adopt."""
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
            epoch=self.gate.epoch,
            books=books,
        )

    def misbehaved(self, error: HintfleetError) -> None:
        """The guest broke a rule. One that does so over and over is given up."""
        if self.conduct.violated(error, time.monotonic()):
            self.lost(f"dropped: it {self.conduct}")

    @property
    def most_memory_bytes(self) -> int:
        """What it can have, all that can be plugged in included."""
        return max(self.spec.memory_bytes, self.spec.max_memory_bytes)

    def evidence(self) -> str:
        """The last lines of the guest's console or log, and how it behaved."""
        said = printable(self.running.evidence()) if self.running else ""
        return "\n".join(filter(None, (said, str(self.conduct))))

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise GuestLost(f"guest {self.name}: {self._lost}")

    # Streams

    def accepts(self, token: str) -> bool:
        """Whether a stream that bears this token comes from this guest."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    def connect_hinting(self, stream: Stream, epochs: Epochs) -> int:
        """`stream` said Hello: its first message will be the Welcome, once the gate allows
        it. Returns the session's number, for `batch_arrived` and `leave_hinting`."""
        session = epochs.next()
        self._sessions[session] = stream
        self.memory.forget_what_was_told()  # on a stream that was cut
        self._carry_out(self.gate.connected(session))
        return session

    def batch_arrived(self, session: int, batch: gate.Batch) -> None:
        """A batch came on a session; it will be run or skipped, and acknowledged.

        :raises InvalidInput: it breaks the protocol; the session is to be ended with that.
        """
        self._carry_out(self.gate.arrived(session, batch))

    def leave_hinting(self, session: int) -> None:
        """The session's stream has ended; if it was the newest, its epoch ends with it."""
        stream = self._sessions.pop(session)
        self._carry_out(self.gate.left(session))
        error = TransientError(f"guest {self.name}: its hinting session ended")
        self._requests.fail_soon(stream, error)

    @property
    def _hinting(self) -> Stream | None:
        """The session that is welcome."""
        return self._sessions.get(self.gate.epoch) if self.gate.state is State.OPEN else None

    def attach_workload(self, stream: Stream) -> None:
        """Make `stream` the one that workload commands go to.

        Those without an answer are sent again: the workload answers what it has done from
        memory, so that a link that was cut costs nobody his command.
        """
        if self._workload is not None:
            self._workload.end()
        self._workload = stream
        self._workload_is_there.set()
        self._requests.send_again(stream, hinting_pb2.WorkloadCommand)
        self._note_ready()

    def leave_workload(self, stream: Stream) -> None:
        """`stream` has ended."""
        if self._workload is stream:
            self._workload = None
            self._workload_is_there.clear()
            error = OutcomeUnknown(f"guest {self.name}: its workload stream ended")
            self._requests.fail_soon(stream, error)

    def answer(self, request_id: int, message: object) -> None:
        """The guest answered a request; one that nobody waits for is dropped."""
        self._requests.answered(request_id, message)

    def _note_ready(self) -> None:
        works = self._method_works and (not self._hints or self.gate.state is State.OPEN)
        if self._workload is not None and works:
            self._ready.set()

    # Requests to the guest

    async def run_step(
        self, make: Callable[[int], hinting_pb2.WorkloadCommand], command_id: int = 0
    ) -> hinting_pb2.Done:
        """Have the workload do one command and wait until it is done.

        :param command_id: of a command that may be asked for again, also of another host
            agent; 0 for one that is like no other.
        :raises GuestLost: the guest is gone.
        :raises OutcomeUnknown: its stream ended while it worked.
        :raises Refused: the guest could not do it (out of memory).
        """
        # A link that was cut is back within a moment.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETURN_S):
                await self._workload_is_there.wait()
        done = await self._request(self._workload, "workload", make, hinting_pb2.Done, command_id)
        if done.error:
            raise Refused(f"guest {self.name}: {printable(done.error)}")
        return done

    async def settle(self) -> hinting_pb2.Settled:
        """Have the guest report now; return when all that it can hint is acknowledged.

        The peers cannot be asked: under them, return when nothing leaves the RAM any more.
        """
        if self.spec.method in _PEERS:
            await self._quiet()
            return hinting_pb2.Settled()
        await self.tell_refaults()
        return await self._request(
            self._hinting,
            "hinting session",
            lambda n: hinting_pb2.HostMessage(settle=hinting_pb2.Settle(request_id=n)),
            hinting_pb2.Settled,
        )

    async def _quiet(self) -> None:
        lowest_bytes = self.memory.books_now().resident_bytes
        since_s = time.monotonic()
        while time.monotonic() - since_s < _QUIET_S:
            await asyncio.sleep(_QUIET_LOOK_S)
            self._check_alive()
            resident_bytes = self.memory.books_now().resident_bytes
            if resident_bytes < lowest_bytes - _NOISE_BYTES:
                lowest_bytes, since_s = resident_bytes, time.monotonic()

    async def _request(
        self,
        stream: Stream | None,
        what: str,
        make: Callable[[int], object],
        answer_type: type[_T],
        request_id: int = 0,
    ) -> _T:
        self._check_alive()
        if stream is None:
            raise TransientError(f"guest {self.name} has no {what} open now")
        return await self._requests.ask(stream, make, answer_type, request_id)

    # What the gate instructs

    def _carry_out(self, instructions: Sequence[gate.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case gate.Welcome(session):
                    self._sessions[session].send(welcome_of(session, self.spec.hinting))
                    self._note_ready()
                case gate.EndSession(session, error):
                    self._sessions[session].end(error)
                case gate.TakeTurn():
                    # Not awaited by any session: a punch cannot be called back.
                    self._begin(self._take_turn())
                case gate.Post(batch, outcome):
                    self.memory.post(batch.ranges, outcome, batch.wire_bytes)
                case gate.Acknowledge(session, batch, outcome):
                    self._sessions[session].send(ack_of(batch, outcome))

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._unstoppable.add(task)
        task.add_done_callback(self._unstoppable.discard)
        return task

    async def _with_ram(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do this with the RAM to itself. It goes on if the caller is cancelled: a thread that
        looks at the RAM cannot be called back, and the next must not begin before it ends."""

        async def locked() -> _T:
            async with self.memory.alone:
                return await work

        return await asyncio.shield(self._begin(locked()))

    async def _take_turn(self) -> None:
        async with self.memory.alone:
            instructions = self.gate.turn_came(time.monotonic())
            self._carry_out(instructions)
            for instruction in instructions:
                if isinstance(instruction, gate.Run):
                    outcome = await self._run(instruction.batch)
                    self._carry_out(self.gate.finished(instruction.batch, outcome))

    async def _run(self, batch: gate.Batch) -> Outcome:
        outcome = await self.memory.reclaim(batch.ranges)
        pieces = outcome.reclaimed.run_count + outcome.absent.run_count
        self.conduct.made_work(pieces - len(batch.ranges), time.monotonic())
        return outcome

    # Memory

    async def resize(self, memory_bytes: int) -> None:
        """Plug or unplug memory until the guest has so much; see resizing.py. The work goes
        on if the caller is cancelled, so that it never stays half done."""
        await asyncio.shield(self._begin(resize(self, memory_bytes)))

    @property
    def provisioned_bytes(self) -> int:
        """What the guest has now, or is to start with."""
        return self.running.ram.provisioned_bytes if self.running else self.spec.memory_bytes

    async def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Enter memory that the driver has plugged; returns which pages came."""
        async with self.memory.alone:
            return self.memory.plugged(segments)

    async def unplugged(self, pages: RangeSet) -> None:
        """Drop memory that the driver has unplugged, and take it out of the books. A batch
        that names it from now on finds it outside the RAM (I3).

        :raises Refused: the host's kernel would not drop it; it is in the books still.
        """
        await self._with_ram(self.memory.unplugged(pages))

    @property
    def chunk_order(self) -> int:
        """The order of what it hints."""
        return self.spec.hinting.chunk_order or _DEFAULT_CHUNK_ORDER

    async def tell_refaults(self) -> None:
        """Audit in full, and tell the guest in which chunks it has used absent memory since."""
        await self._with_ram(self._audit_and_tell())

    async def _audit_and_tell(self) -> None:
        await self.memory.audit()
        await self._tell()

    async def _tell(self) -> None:
        said = self.memory.used_again
        if not said or self._hinting is None:
            return

        def packed() -> bytes:
            return encode(said.whole_chunks(self.chunk_order).ranges())

        few = said.section_count <= _FEW_SECTIONS
        ranges = packed() if few else await asyncio.to_thread(packed)
        # Still under the lock: the ack of a batch that took them must not come first.
        if self._hinting is not None and self.memory.used_again is said:
            self.memory.used_again = NO_PAGES
            message = hinting_pb2.Refaulted(ranges=ranges)
            self._hinting.send(hinting_pb2.HostMessage(refaulted=message))

    def tell_policy(self, policy: hinting_pb2.Policy) -> None:
        """Tell the guest's agent, if one is in session. Nothing twice in a row is not said."""
        nothing_again = not policy.allowance_pages and not self._allowed_something
        if self._hinting is not None and not nothing_again:
            self._allowed_something = bool(policy.allowance_pages)
            self._hinting.send(hinting_pb2.HostMessage(policy=policy))

    # Audits

    @property
    def next_check_s(self) -> float:
        """No `check` is due before this time of the monotonic clock."""
        return self._pace.next_check_s

    def check(self, now_s: float) -> None:
        """Begin to audit, and to tell the guest what it uses again, if that is due."""
        busy = self._audit_task is not None and not self._audit_task.done()
        # While one audit is under way, none is due: else the next would count as done.
        look = self._pace.check(now_s, 0 if busy else self.memory.moved_pages())
        news = self.memory.used_again and self._hinting is not None
        tell = bool(news) and now_s >= self._next_tell_s
        if (look or tell) and not busy:
            self._audit_task = self._begin(self._check(look, now_s))

    async def _check(self, look: bool, now_s: float) -> None:
        async with self.memory.alone:
            if look:
                took_s = await self.memory.look()
                self._pace.looked(took_s)
                if not self._hints:
                    self._observing.add(took_s)
            if now_s >= self._next_tell_s:
                self._next_tell_s = now_s + self._report_period_s
                await self._tell()

    async def ledger(self) -> host_pb2.Ledger:
        """Audit in full against the RAM file and return the books."""
        return await self._with_ram(self.memory.audit())

    async def as_pb2(self) -> host_pb2.Guest:
        """What the control API says of this guest."""
        return host_pb2.Guest(
            name=self.name,
            uuid=self.uuid,
            trial_id=self.trial_id,
            spec=self.spec,
            epoch=self.gate.epoch,
            ledger=await self.ledger(),
            pid=self.running.pid if self.running else 0,
        )

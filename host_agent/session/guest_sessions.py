"""The streams that one guest's agent and workload have opened, and the messages on them.

The gate decides which session is welcome and which batches may run (I2). This module carries out
the gate's instructions, on the host agent's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from hintfleet.errors import GuestLost, OutcomeUnknown, Refused, TransientError
from hintfleet.logs import LogRateLimit, fields
from hintfleet.ranges import encode
from hintfleet.settings import DEFAULT_CHUNK_ORDER
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.memory.guest_memory import GuestMemory
from host_agent.memory.page_map import NO_PAGES
from host_agent.memory.reclaim import Outcome
from host_agent.session import gate
from host_agent.session.gate import Epochs, Gate, State
from host_agent.session.messages import ack_of, welcome_of
from host_agent.session.rate_limits import Conduct
from host_agent.session.requests import Requests
from host_agent.session.stream import Stream
from host_agent.session.told_policy import ToldPolicy
from host_agent.session.validation import printable
from host_agent.tasks import LastingTasks

_T = TypeVar("_T")

# How long a command waits for a workload to attach: its stream may just have been cut.
_RECONNECT_S = 1.0
# How long `settle` waits for a session: a guest that was just resumed has to connect again.
_SESSION_S = 5.0
_POLL_S = 0.05
# If a guest sends no batch for so long after it was told to rest, it has none in flight.
_QUIET_S = 0.3
_REST_S = 2.0

# Encoding the chunks of at most this many sections takes less time than handing them to a thread.
_FEW_SECTIONS = 16

_log = logging.getLogger("hintfleet.host.session")


class GuestSessions:
    """All hinting sessions of a guest, and the streams of its workload."""

    def __init__(
        self,
        guest_name: str,
        settings: host_pb2.HintingSettings,
        memory: GuestMemory,
        tasks: LastingTasks,
        opened: Callable[[], None],
    ) -> None:
        """:param memory: the memory that batches reclaim.
        :param opened: called when a session is welcomed or a workload attaches.
        """
        self.conduct = Conduct()
        self.telemetry = hinting_pb2.Telemetry()
        self.telemetry_at_s = 0.0
        """When `telemetry` arrived, by the monotonic clock."""
        self.resident_parts: host_pb2.ResidentParts | None = None
        """What the resident memory consisted of when `telemetry` arrived; None if that cannot be
        told from `telemetry`."""
        self.refusals: Counter[str] = Counter()
        """How often policy `pressure` allowed the guest nothing, by reason."""
        self.workload_is_there = asyncio.Event()
        """Set while a workload is attached. Also set when the guest is lost, so that nobody waits
        any longer."""
        self._name = guest_name
        self.policy = ToldPolicy(guest_name, settings, self._send_policy)
        self.boot_id = ""
        """The boot id in the last Hello of the guest's agent; empty before the first Hello."""
        self.chunk_order = settings.chunk_order or DEFAULT_CHUNK_ORDER
        """The order of the chunks that the guest hints, by its settings."""
        self._memory = memory
        self._tasks = tasks
        self._opened = opened
        self._gate = Gate()
        self._by_session: dict[int, Stream] = {}
        self._workload: Stream | None = None
        self._requests = Requests()
        self._lost: GuestLost | None = None
        self.epoch_began_s = 0.0
        """Wall clock at the last Welcome; 0 before the first."""
        self.refusal = ""
        """Why policy `pressure` allows the guest nothing now; empty if it allows something, or if
        the guest has another policy."""
        self.why_closed = "its agent has not connected"
        """Why no session is welcomed. While one is, this text is out of date, and is not used."""
        self._skips = LogRateLimit()

    @property
    def epoch(self) -> int:
        """The epoch of the last Welcome; 0 before the first."""
        return self._gate.epoch

    @property
    def is_welcome(self) -> bool:
        """Whether a hinting session is open and welcomed."""
        return self._gate.state is State.OPEN

    @property
    def has_workload(self) -> bool:
        """Whether a workload is attached."""
        return self._workload is not None

    def end_all(self, error: GuestLost) -> None:
        """End all streams of a guest that is gone; all requests to it fail with `error`."""
        self._lost = error
        self.policy.close()
        self._carry_out(self._gate.gone(error))
        if self._workload is not None:
            self._workload.end(error)
        self._requests.fail_all(error)
        self.workload_is_there.set()

    def door_moved(self, why_closed: str | None) -> None:
        """Note that the memory door has opened or closed. If it has closed, the session and its
        epoch end. The agent may connect again at once, and is welcomed when the door opens.

        :param why_closed: None if the door has opened.
        """
        if why_closed is None:
            self._carry_out(self._gate.door_opened())
        else:
            self.why_closed = why_closed
            error = TransientError(f"guest {self._name}: {why_closed}")
            self._carry_out(self._gate.door_closed(error))

    # Hinting sessions

    def connect_hinting(self, stream: Stream, epochs: Epochs, boot_id: str = "") -> int:
        """Add a stream that sent Hello; return its session number, for `batch_arrived` and
        `leave_hinting`. An earlier session is ended. The stream's first message is the Welcome,
        which is sent when the gate allows it."""
        session = epochs.next()
        if self._by_session:
            _log.info("session superseded", extra=self._fields(epoch=max(self._by_session)))
        self._by_session[session], self.boot_id = stream, boot_id
        # Refaults that were sent on an earlier stream may not have arrived before its end.
        self._memory.tell_all_again()
        self._carry_out(self._gate.connected(session))
        return session

    def batch_arrived(self, session: int, batch: gate.Batch) -> None:
        """Hand a batch that came on a session to the gate. It is skipped at once if the session was
        superseded or ended; else it is run or skipped later, and acknowledged if the session is
        open then.

        :raises InvalidInput: the batch breaks the protocol; the caller must end the session with
            this error.
        """
        self._carry_out(self._gate.arrived(session, batch))

    def leave_hinting(self, session: int) -> None:
        """Remove a session whose stream has ended. If it was the newest, its epoch ends, too. The
        requests that were sent on this stream and have no answer fail after a grace period."""
        stream = self._by_session.pop(session)
        if not self._by_session:
            self.why_closed = f"its agent's session ended: {stream.why_ended}"
        self._carry_out(self._gate.left(session))
        _log.info("session ended", extra=self._fields(epoch=session, reason=stream.why_ended))
        error = TransientError(f"guest {self._name}: its hinting session ended")
        self._requests.fail_soon(stream, error)

    @property
    def _hinting(self) -> Stream | None:
        return self._by_session.get(self.epoch) if self.is_welcome else None

    def _carry_out(self, instructions: Sequence[gate.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case gate.Welcome(session):
                    welcome = welcome_of(session, self.policy.of_new_session())
                    self._by_session[session].send(welcome)
                    _log.info("session welcomed", extra=self._fields(epoch=session))
                    self.epoch_began_s = time.time()
                    self._opened()
                case gate.EndSession(session, error):
                    self._by_session[session].end(error)
                case gate.TakeTurn():
                    # A task of its own. gRPC cancels the handler of a stream that is cut, but a
                    # punch cannot be cancelled, and its outcome must reach the gate and the books.
                    self._tasks.begin(self._take_turn())
                case gate.Post(batch, outcome):
                    self._memory.post(batch.ranges, outcome, batch.wire_bytes)
                    self._log_skips(batch, outcome)
                case gate.Acknowledge(session, batch, outcome):
                    self._by_session[session].send(ack_of(batch, outcome))

    async def _take_turn(self) -> None:
        async with self._memory.lock:
            instructions = self._gate.turn_came(time.monotonic())
            self._carry_out(instructions)
            for instruction in instructions:
                if isinstance(instruction, gate.Run):
                    outcome = await self._run(instruction.batch)
                    self._carry_out(self._gate.finished(instruction.batch, outcome))

    async def _run(self, batch: gate.Batch) -> Outcome:
        outcome = await self._memory.reclaim(batch.ranges)
        pieces = outcome.reclaimed.run_count + outcome.absent.run_count
        self.conduct.count_pieces(pieces - len(batch.ranges), time.monotonic())
        return outcome

    def _log_skips(self, batch: gate.Batch, outcome: Outcome) -> None:
        if outcome.skipped and (left_out := self._skips.due()) is not None:
            reasons = (hinting_pb2.SkipReason.Name(reason) for reason in outcome.skipped)
            about = {"epoch": batch.epoch, "seq": batch.seq, "reason": ",".join(reasons)}
            _log.warning("batch skipped", extra=self._fields(**about, **left_out))

    # What the guest is told

    async def tell_refaults(self) -> None:
        """Report to the guest the chunks with pages of `refaults_to_tell` (most often memory that
        was absent and is in use again; first in a session, all that is resident), if there are any
        and it has a session. The caller holds the memory's lock."""
        # Without the lock, batches could replace the set each time while the thread works, and a
        # busy guest might never be told.
        used = self._memory.refaults_to_tell
        if not used or self._hinting is None:
            return

        def packed() -> bytes:
            return encode(used.whole_chunks(self.chunk_order).ranges())

        few = used.section_count <= _FEW_SECTIONS
        ranges = packed() if few else await asyncio.to_thread(packed)
        # While the thread worked, the session may have ended, or `tell_all_again` may have replaced
        # the set. Then do not send: a later call will.
        if self._hinting is not None and self._memory.refaults_to_tell is used:
            self._memory.refaults_to_tell = NO_PAGES
            message = hinting_pb2.Refaulted(ranges=ranges)
            self._hinting.send(hinting_pb2.HostMessage(refaulted=message))

    @property
    def has_refaults_to_tell(self) -> bool:
        """Whether `tell_refaults` would send a message."""
        return bool(self._memory.refaults_to_tell) and self._hinting is not None

    def _send_policy(self, policy: hinting_pb2.Policy) -> None:
        if self._hinting is not None:
            self._hinting.send(hinting_pb2.HostMessage(policy=policy))

    async def rest(self) -> None:
        """Tell the guest to hint no more, if it has a session. Wait until no batch is waiting or
        running and the last one arrived at least 0.3 s ago, but two seconds at most."""
        deadline_s = time.monotonic() + _REST_S
        if self._hinting is not None:
            self.policy.rest()
            await asyncio.sleep(_QUIET_S)
        while self._gate.idle_s(time.monotonic()) < _QUIET_S and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)

    # The workload

    def attach_workload(self, stream: Stream) -> None:
        """Send workload commands to this stream from now on, and end the stream before it.

        Commands without an answer are sent again, because they or their answers may have been lost
        with the stream before. The workload runs no command twice: if it gets one again, it only
        sends the answer.
        """
        if self._workload is not None:
            self._workload.end()
        self._workload = stream
        self.workload_is_there.set()
        _log.info("workload attached", extra=self._fields())
        self._requests.send_again(stream, hinting_pb2.WorkloadCommand)
        self._opened()

    def leave_workload(self, stream: Stream) -> None:
        """Note that a workload's stream has ended. If the workload does not attach again within a
        grace period, its open commands fail. A stream that was replaced is ignored."""
        if self._workload is stream:
            self._workload = None
            if self._lost is None:
                self.workload_is_there.clear()
            _log.info("workload left", extra=self._fields(reason=stream.why_ended))
            error = OutcomeUnknown(f"guest {self._name}: its workload stream ended")
            self._requests.fail_soon(stream, error)

    # What the host asks of the guest and its workload

    async def run_step(
        self, make: Callable[[int], hinting_pb2.WorkloadCommand], command_id: int = 0
    ) -> hinting_pb2.Done:
        """Send the workload one command and return its answer when the command is done.

        :param make: returns the command with the id that it is given.
        :param command_id: id of a command that may be retried, even through another host agent;
            0 for a new id.
        :raises GuestLost: the guest is gone.
        :raises TransientError: no workload is attached, and none attached within a second.
        :raises OutcomeUnknown: the workload's stream ended before the answer arrived, and no new
            stream was attached within a second; or the answer is of another type.
        :raises Refused: the workload failed to run the command (out of memory, for example).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECONNECT_S):
                await self.workload_is_there.wait()
        done = await self._request(self._workload, "workload", make, hinting_pb2.Done, command_id)
        if done.error:
            raise Refused(f"guest {self._name}: {printable(done.error)}")
        return done

    async def settle(self) -> hinting_pb2.Settled:
        """Ask the guest to hint now; return when all that it can hint is acknowledged.

        :raises GuestLost: the guest is gone.
        :raises TransientError: the guest has no session within five seconds, or its session ended.
        :raises OutcomeUnknown: the guest's answer is of another type.
        """
        deadline_s = time.monotonic() + _SESSION_S
        while self._hinting is None and self._lost is None and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        return await self._request(
            self._hinting,
            "hinting session",
            lambda number: hinting_pb2.HostMessage(settle=hinting_pb2.Settle(request_id=number)),
            hinting_pb2.Settled,
        )

    def answer(self, request_id: int, message: object) -> None:
        """Hand the guest's answer to the request that waits for it; drop it if none does."""
        self._requests.answered(request_id, message)

    async def _request(
        self,
        stream: Stream | None,
        what: str,
        make: Callable[[int], object],
        answer_type: type[_T],
        request_id: int = 0,
    ) -> _T:
        if self._lost is not None:
            raise self._lost.with_traceback(None)  # see Stream.next
        if stream is None:
            raise TransientError(f"guest {self._name} has no {what} open now")
        return await self._requests.ask(stream, make, answer_type, request_id)

    def _fields(self, **more: object) -> dict[str, dict[str, object]]:
        return fields(guest=self._name, **more)

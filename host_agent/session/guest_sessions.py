"""The streams that one guest's agent has opened, and what is said on them.

Which session is welcome and which batches may run (I2) is decided by the gate; its
instructions are carried out here. All of it runs on the host agent's event loop.
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
from host_agent.session.messages import ack_of, policy_of, welcome_of
from host_agent.session.rate_limits import Conduct
from host_agent.session.requests import Requests
from host_agent.session.stream import Stream
from host_agent.session.validation import printable
from host_agent.tasks import LastingTasks

_T = TypeVar("_T")

_RECONNECT_S = 1.0

_FEW_SECTIONS = 16
"""The chunks of so many are encoded sooner than a thread begins with them."""

_log = logging.getLogger("hintfleet.host.session")


class GuestSessions:
    """A guest's hinting sessions and its workload's stream, from first to last."""

    def __init__(
        self,
        guest_name: str,
        settings: host_pb2.HintingSettings,
        memory: GuestMemory,
        tasks: LastingTasks,
        opened: Callable[[], None],
    ) -> None:
        """:param memory: what batches are run on.
        :param opened: called when a session was welcomed or a workload attached.
        """
        self.conduct = Conduct()
        self.telemetry = hinting_pb2.Telemetry()
        self.refusals: Counter[str] = Counter()
        """How often its policy allowed it nothing, by reason."""
        self.workload_is_there = asyncio.Event()
        """Set for good when the guest is lost, so that nobody waits for it."""
        self._name = guest_name
        self._settings = settings
        self._memory = memory
        self._tasks = tasks
        self._opened = opened
        self._gate = Gate()
        self._by_session: dict[int, Stream] = {}
        self._workload: Stream | None = None
        self._requests = Requests()
        self._lost: GuestLost | None = None
        self._allowed_something = False
        self._skips = LogRateLimit()

    @property
    def epoch(self) -> int:
        """The epoch that was welcomed last; 0 before the first."""
        return self._gate.epoch

    @property
    def is_welcome(self) -> bool:
        """Whether a hinting session is open and welcomed."""
        return self._gate.state is State.OPEN

    @property
    def has_workload(self) -> bool:
        """Whether a workload is attached."""
        return self._workload is not None

    @property
    def chunk_order(self) -> int:
        """The order of what the guest hints."""
        return self._settings.chunk_order or DEFAULT_CHUNK_ORDER

    def end_all(self, error: GuestLost) -> None:
        """The guest is gone: its epoch ends now, and whoever waits for it gets `error`."""
        self._lost = error
        self._carry_out(self._gate.gone(error))
        if self._workload is not None:
            self._workload.end(error)
        self._requests.fail_all(error)
        self.workload_is_there.set()

    # Hinting sessions

    def connect_hinting(self, stream: Stream, epochs: Epochs) -> int:
        """Enter a stream that said Hello: its first message will be the Welcome, once the gate
        allows it. Returns the session's number, for `batch_arrived` and `leave_hinting`."""
        session = epochs.next()
        if self._by_session:
            _log.info("session superseded", extra=self._fields(epoch=max(self._by_session)))
        self._by_session[session] = stream
        self._memory.forget_what_was_told()  # on a stream that was cut
        self._carry_out(self._gate.connected(session))
        return session

    def batch_arrived(self, session: int, batch: gate.Batch) -> None:
        """Take a batch that came on a session; it will be run or skipped, and acknowledged.

        :raises InvalidInput: it breaks the protocol; the session is to be ended with that.
        """
        self._carry_out(self._gate.arrived(session, batch))

    def leave_hinting(self, session: int) -> None:
        """Forget a session whose stream has ended; if it was the newest, its epoch ends too."""
        stream = self._by_session.pop(session)
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
                    self._by_session[session].send(welcome_of(session, self._settings))
                    _log.info("session welcomed", extra=self._fields(epoch=session))
                    self._opened()
                case gate.EndSession(session, error):
                    self._by_session[session].end(error)
                case gate.TakeTurn():
                    # Not awaited by any session: a punch cannot be called back.
                    self._tasks.begin(self._take_turn())
                case gate.Post(batch, outcome):
                    self._memory.post(batch.ranges, outcome, batch.wire_bytes)
                    self._log_skips(batch, outcome)
                case gate.Acknowledge(session, batch, outcome):
                    self._by_session[session].send(ack_of(batch, outcome))

    async def _take_turn(self) -> None:
        async with self._memory.alone:
            instructions = self._gate.turn_came(time.monotonic())
            self._carry_out(instructions)
            for instruction in instructions:
                if isinstance(instruction, gate.Run):
                    outcome = await self._run(instruction.batch)
                    self._carry_out(self._gate.finished(instruction.batch, outcome))

    async def _run(self, batch: gate.Batch) -> Outcome:
        outcome = await self._memory.reclaim(batch.ranges)
        pieces = outcome.reclaimed.run_count + outcome.absent.run_count
        self.conduct.made_work(pieces - len(batch.ranges), time.monotonic())
        return outcome

    def _log_skips(self, batch: gate.Batch, outcome: Outcome) -> None:
        if outcome.skipped and (left_out := self._skips.due()) is not None:
            reasons = (hinting_pb2.SkipReason.Name(reason) for reason in outcome.skipped)
            about = {"epoch": batch.epoch, "seq": batch.seq, "reason": ",".join(reasons)}
            _log.warning("batch skipped", extra=self._fields(**about, **left_out))

    # What the guest is told

    async def tell_refaults(self) -> None:
        """Tell the guest in which chunks absent memory was found in use. The caller holds the
        memory's lock: the ack of a batch that took those chunks must not come first."""
        used = self._memory.used_again
        if not used or self._hinting is None:
            return

        def packed() -> bytes:
            return encode(used.whole_chunks(self.chunk_order).ranges())

        few = used.section_count <= _FEW_SECTIONS
        ranges = packed() if few else await asyncio.to_thread(packed)
        if self._hinting is not None and self._memory.used_again is used:
            self._memory.used_again = NO_PAGES
            message = hinting_pb2.Refaulted(ranges=ranges)
            self._hinting.send(hinting_pb2.HostMessage(refaulted=message))

    @property
    def has_refaults_to_tell(self) -> bool:
        """Whether `tell_refaults` would say something."""
        return bool(self._memory.used_again) and self._hinting is not None

    def tell_allowance(self, allowance_bytes: int) -> None:
        """Tell an agent in session how much it may hint now; no allowance is told once only."""
        policy = policy_of(self._settings, allowance_bytes)
        nothing_again = not policy.allowance_pages and not self._allowed_something
        if self._hinting is not None and not nothing_again:
            self._allowed_something = bool(policy.allowance_pages)
            self._hinting.send(hinting_pb2.HostMessage(policy=policy))

    # The workload

    def attach_workload(self, stream: Stream) -> None:
        """Make `stream` the one that workload commands go to.

        Those without an answer are sent again: the workload answers what it has done from
        memory, so that a link that was cut costs nobody his command.
        """
        if self._workload is not None:
            self._workload.end()
        self._workload = stream
        self.workload_is_there.set()
        _log.info("workload attached", extra=self._fields())
        self._requests.send_again(stream, hinting_pb2.WorkloadCommand)
        self._opened()

    def leave_workload(self, stream: Stream) -> None:
        """Forget a workload's stream that has ended."""
        if self._workload is stream:
            self._workload = None
            self.workload_is_there.clear()
            _log.info("workload left", extra=self._fields(reason=stream.why_ended))
            error = OutcomeUnknown(f"guest {self._name}: its workload stream ended")
            self._requests.fail_soon(stream, error)

    # Requests

    async def run_step(
        self, make: Callable[[int], hinting_pb2.WorkloadCommand], command_id: int = 0
    ) -> hinting_pb2.Done:
        """Have the workload do one command and wait until it is done.

        :param command_id: of a command that may be asked for again, also of another host
            agent; 0 for one that is like no other.
        :raises GuestLost: the guest is gone.
        :raises TransientError: it has no workload now.
        :raises OutcomeUnknown: its stream ended while it worked.
        :raises Refused: the guest could not do it (out of memory).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECONNECT_S):
                await self.workload_is_there.wait()
        done = await self._request(self._workload, "workload", make, hinting_pb2.Done, command_id)
        if done.error:
            raise Refused(f"guest {self._name}: {printable(done.error)}")
        return done

    async def settle(self) -> hinting_pb2.Settled:
        """Have the guest report now; return when all that it can hint is acknowledged.

        :raises GuestLost, TransientError, OutcomeUnknown: as run_step.
        """
        return await self._request(
            self._hinting,
            "hinting session",
            lambda number: hinting_pb2.HostMessage(settle=hinting_pb2.Settle(request_id=number)),
            hinting_pb2.Settled,
        )

    def answer(self, request_id: int, message: object) -> None:
        """Take the guest's answer to a request; one that nobody waits for is dropped."""
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
            raise self._lost
        if stream is None:
            raise TransientError(f"guest {self._name} has no {what} open now")
        return await self._requests.ask(stream, make, answer_type, request_id)

    def _fields(self, **more: object) -> dict[str, dict[str, object]]:
        return fields(guest=self._name, **more)

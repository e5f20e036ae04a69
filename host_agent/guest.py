"""One guest of this host: its memory, its books, and the streams its agent opened.

Everything here runs on the host agent's event loop; what blocks (system calls on
the RAM file) runs in worker threads under `_ram_lock`, so that an audit and a
punch never overlap, and a new epoch never begins while a batch runs (I2).
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from hintfleet.errors import GuestLost, HintfleetError, OutcomeUnknown, Refused, TransientError
from hintfleet.ranges import EMPTY, RangeSet, encode
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.balloon import Balloon, Rule
from host_agent.ballooning import follow
from host_agent.gate import Epochs, Gate, State
from host_agent.guests import RunningGuest
from host_agent.ledger import Ledger
from host_agent.reclaim import Outcome, reclaim, skip

_T = TypeVar("_T")

_NEWS_OF_LOSS_S = 1.0
_DEFAULT_CHUNK_ORDER = 9

_PEERS = frozenset({host_pb2.REPORTING, host_pb2.BALLOON})
"""Methods that take memory out of the RAM without us."""

# The kernel's PAGE_REPORTING_DELAY is 2 s, and a balloon's step takes as long: after two
# of them without any effect there is nothing more to come.
_QUIET_S = 4.5
_QUIET_LOOK_S = 0.1
_NOISE_BYTES = 1 << 20


class Stream:
    """What the service has to say on one open stream; closed with an error or None."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[object] = asyncio.Queue()

    def send(self, message: object) -> None:
        """Queue a message for the guest."""
        self._queue.put_nowait(message)

    def end(self, error: HintfleetError | None = None) -> None:
        """End the stream after what is queued; the first end counts."""
        self._queue.put_nowait(_End(error))

    async def next(self) -> object | None:
        """The next message; None at a clean end.

        :raises HintfleetError: the stream was ended with it.
        """
        item = await self._queue.get()
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            raise item.error
        return None


class _End:
    def __init__(self, error: HintfleetError | None) -> None:
        self.error = error


class Guest:
    """A guest from the moment it is asked for until its books are closed."""

    def __init__(
        self, *, name: str, uuid: str, token: str, trial_id: str, spec: host_pb2.GuestSpec
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.trial_id = trial_id
        self.spec = spec
        self.gate = Gate()
        self.telemetry = hinting_pb2.Telemetry()
        self.refusals: Counter[str] = Counter()
        """How often its policy allowed it nothing, by reason."""
        self._allowed_something = False
        self.running: RunningGuest | None = None
        self.token = token
        self._ledger: Ledger | None = None
        self.last_ledger = host_pb2.Ledger()
        """The books as of the last audit; closed books once the guest is destroyed."""
        self._ram_lock = asyncio.Lock()
        self._unsaid_used = EMPTY
        self._hinting: Stream | None = None
        self._workload: Stream | None = None
        self._ready = asyncio.Event()
        self._lost: str | None = None
        self._ids = itertools.count(1)
        self._answers: dict[int, tuple[Stream, asyncio.Future[object]]] = {}
        self._batches: set[asyncio.Task[object]] = set()
        self._ballooning: asyncio.Task[None] | None = None

    # Life

    def started(self, running: RunningGuest) -> None:
        """The driver has made it; its RAM is untouched or nearly so."""
        self.running = running
        self._ledger = Ledger(running.ram.pages, others_reclaim=self.spec.method in _PEERS)
        if running.balloon is not None:
            self._ballooning = asyncio.create_task(self._balloon(running.balloon))

    async def _balloon(self, balloon: Balloon) -> None:
        await self._ready.wait()  # a guest that boots is left alone
        try:
            await follow(balloon, Rule.of(self.spec))
        except GuestLost:  # the driver says why
            pass
        except HintfleetError as error:
            self.lost(f"its balloon cannot be moved: {error}")

    def lost(self, reason: str) -> None:
        """The guest is gone: its epoch ends now, and whoever waits for it hears why."""
        if self._lost is not None:
            return
        self._lost = reason
        self.gate.gone()
        error = GuestLost(f"guest {self.name}: {reason}")
        for stream in (self._hinting, self._workload):
            if stream is not None:
                stream.end(error)
        for stream, _ in list(self._answers.values()):  # some may have left already
            self._fail_answers(stream, error)
        self._ready.set()

    async def ready(self, timeout_s: float) -> None:
        """Wait until the guest's agent is attached, and welcomed if its method hints.

        :raises GuestLost: the guest ended, or did not attach in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise GuestLost(
                f"guest {self.name}: its agent did not attach within {timeout_s:.0f} s"
            ) from None
        self._check_alive()

    async def close(self) -> host_pb2.Ledger:
        """End the guest, free all that it held, and return its closed books. Repeatable."""
        await self.ledger()
        self.lost("destroyed")
        if self._ballooning is not None:
            self._ballooning.cancel()
            await asyncio.wait([self._ballooning])
        async with self._ram_lock:
            running, self.running = self.running, None
            if running is not None:
                await asyncio.to_thread(running.close)
        return self.last_ledger

    def evidence(self) -> str:
        """The last lines of the guest's console or log."""
        return self.running.evidence() if self.running else ""

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise GuestLost(f"guest {self.name}: {self._lost}")

    # Streams

    def accepts(self, token: str) -> bool:
        """Whether a stream that bears this token comes from this guest."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    async def take_over_hinting(self, stream: Stream, epochs: Epochs) -> int:
        """Make `stream` this guest's session: end the one before, wait until none of its
        batches runs, and open the next epoch (I2). Returns the epoch."""
        previous, self._hinting = self._hinting, stream
        self.gate.close()
        if previous is not None:
            previous.end(GuestLost("another agent of this guest has connected"))
        async with self._ram_lock:
            self._check_alive()
            if self._hinting is not stream:
                raise GuestLost("another agent of this guest has connected")
            self.gate.open(epochs.next())
        self._note_ready()
        return self.gate.epoch

    def leave_hinting(self, stream: Stream) -> None:
        """`stream` has ended; if it was the current session, its epoch ends with it."""
        if self._hinting is stream:
            self._hinting = None
            self.gate.close()
            error = TransientError(f"guest {self.name}: its hinting session ended")
            self._fail_answers_soon(stream, error)

    def attach_workload(self, stream: Stream) -> None:
        """Make `stream` the one that workload commands go to."""
        if self._workload is not None:
            self._workload.end()
        self._workload = stream
        self._note_ready()

    def leave_workload(self, stream: Stream) -> None:
        """`stream` has ended."""
        if self._workload is stream:
            self._workload = None
            error = OutcomeUnknown(f"guest {self.name}: its workload stream ended")
            self._fail_answers_soon(stream, error)

    def answer(self, request_id: int, message: object) -> None:
        """The guest answered a request; one that nobody waits for is dropped."""
        if request_id in self._answers and not self._answers[request_id][1].done():
            self._answers[request_id][1].set_result(message)

    def _note_ready(self) -> None:
        hints = self.spec.method == host_pb2.HINTING
        if self._workload is not None and (not hints or self.gate.state is State.OPEN):
            self._ready.set()

    def _fail_answers_soon(self, stream: Stream, error: HintfleetError) -> None:
        """A stream often ends because its guest does, and that news takes its own way: it
        is given time to arrive, for it says more."""
        loop = asyncio.get_running_loop()
        loop.call_later(_NEWS_OF_LOSS_S, self._fail_answers, stream, error)

    def _fail_answers(self, stream: Stream, error: HintfleetError) -> None:
        for asked, answer in self._answers.values():
            if asked is stream and not answer.done():
                answer.set_exception(error)

    # Requests to the guest

    async def run_step(
        self, make: Callable[[int], hinting_pb2.WorkloadCommand]
    ) -> hinting_pb2.Done:
        """Have the workload do one command and wait until it is done.

        :raises GuestLost: the guest is gone.
        :raises OutcomeUnknown: its stream ended while it worked.
        :raises Refused: the guest could not do it (out of memory).
        """
        done = await self._request(self._workload, "workload", make, hinting_pb2.Done)
        if done.error:
            raise Refused(f"guest {self.name}: {done.error}")
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
        lowest_bytes = (await self.ledger()).resident_bytes
        since_s = time.monotonic()
        while time.monotonic() - since_s < _QUIET_S:
            await asyncio.sleep(_QUIET_LOOK_S)
            self._check_alive()
            resident_bytes = (await self.ledger()).resident_bytes
            if resident_bytes < lowest_bytes - _NOISE_BYTES:
                lowest_bytes, since_s = resident_bytes, time.monotonic()

    async def _request(
        self,
        stream: Stream | None,
        what: str,
        make: Callable[[int], object],
        answer_type: type[_T],
    ) -> _T:
        self._check_alive()
        if stream is None:
            raise TransientError(f"guest {self.name} has no {what} open now")
        request_id = next(self._ids)
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = (stream, answer)
        try:
            stream.send(make(request_id))
            message = await answer
        finally:
            del self._answers[request_id]
        if not isinstance(message, answer_type):
            raise OutcomeUnknown(f"guest {self.name} answered with something else")
        return message

    # Memory

    async def run_batch(
        self, epoch: int, hinted: RangeSet, received_s: float, wire_bytes: int
    ) -> Outcome:
        """Reclaim a batch if it may run, and enter it into the books.

        The work goes on if the caller is cancelled: a punch cannot be called back, and
        the lock must be held until it is over.
        """
        task = asyncio.create_task(self._run_batch(epoch, hinted, received_s, wire_bytes))
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)
        return await asyncio.shield(task)

    async def _run_batch(
        self, epoch: int, hinted: RangeSet, received_s: float, wire_bytes: int
    ) -> Outcome:
        async with self._ram_lock:
            reason = self.gate.admit(epoch, time.monotonic() - received_s)
            if reason is not None or self.running is None or self._ledger is None:
                outcome = skip(hinted, hinting_pb2.GUEST_GONE if reason is None else reason)
            else:
                absent = self._ledger.absent_pages
                outcome = await asyncio.to_thread(reclaim, self.running.ram, hinted, absent)
            if self._ledger is not None:
                self._ledger.post(hinted, outcome, wire_bytes)
            # What is gone again must not be told as used after the ack.
            self._unsaid_used -= outcome.reclaimed
            return outcome

    async def tell_refaults(self) -> None:
        """Audit, and tell the guest in which chunks it has used absent memory since."""
        await self.ledger()
        if self._unsaid_used and self._hinting is not None:
            said, self._unsaid_used = self._unsaid_used, EMPTY
            order = self.spec.hinting.chunk_order or _DEFAULT_CHUNK_ORDER
            message = hinting_pb2.Refaulted(ranges=encode(said.whole_chunks(order)))
            self._hinting.send(hinting_pb2.HostMessage(refaulted=message))

    def tell_policy(self, policy: hinting_pb2.Policy) -> None:
        """Tell the guest's agent, if one is in session. Nothing twice in a row is not said."""
        nothing_again = not policy.allowance_pages and not self._allowed_something
        if self._hinting is not None and not nothing_again:
            self._allowed_something = bool(policy.allowance_pages)
            self._hinting.send(hinting_pb2.HostMessage(policy=policy))

    async def ledger(self) -> host_pb2.Ledger:
        """Audit against the RAM file and return the books."""
        async with self._ram_lock:
            if self.running is None or self._ledger is None:
                return self.last_ledger
            ledger, ram = self._ledger, self.running.ram
            resident = await asyncio.to_thread(ram.resident, ledger.absent_pages)
            self._unsaid_used |= ledger.audit(resident)
            self.last_ledger = ledger.as_pb2(ram.resident_bytes())
            return self.last_ledger

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

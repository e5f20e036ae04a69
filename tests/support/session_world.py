"""The real state machines of both sides of the session protocol, in a simulated world.

`HintingCore`, `Gate` and `Fence` are the shipped classes, or subclasses of them that a test passes
in. This module simulates the guest's kernel, the links and the punches, and carries out the
instructions of `HintingCore` and `Gate`. The guest has a few chunks with contents. Messages of one
stream arrive in order; messages of different streams may overtake each other. A punch on the host
takes several steps. Nothing happens by itself: the test calls a method for each step. Some methods
assert what must hold then.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from guest_agent import hinting
from guest_agent.hinting import HintingCore
from hintfleet.errors import GuestLost, TransientError
from hintfleet.ranges import RangeSet
from host_agent.memory.fence import Fence, FenceClosed
from host_agent.memory.page_map import PageMap
from host_agent.memory.reclaim import Outcome
from host_agent.session import gate
from host_agent.session.gate import LIMITS, Gate

CHUNK_COUNT = 9
CHUNK_PAGES = 512
_LIMITS = hinting.Limits(
    ranges_per_batch=3,
    pages_per_batch=3 * CHUNK_PAGES,
    batches_in_flight=LIMITS.batches_in_flight,
)


@dataclass(frozen=True)
class Hello:
    still_isolated: RangeSet


Up = Hello | hinting.Send
Down = gate.Welcome | gate.Acknowledge


@dataclass(eq=False)
class Stream:
    """A stream, with the messages that have not arrived yet.

    :ivar cut: the stream has ended; guest and host notice this later, each at its own time.
    :ivar lossy: messages to the host are lost.
    """

    to_host: deque[Up] = field(default_factory=deque)
    to_guest: deque[Down] = field(default_factory=deque)
    cut: bool = False
    lossy: bool = False

    def send(self, message: Up) -> None:
        """Send to the host; after `lose` the message is lost, because a byte stream has no gaps."""
        if not self.lossy:
            self.to_host.append(message)

    def lose(self) -> None:
        """Lose the messages to the host that have not arrived, and all later ones."""
        self.lossy = True
        self.to_host.clear()


def chunks(ranges: RangeSet) -> list[int]:
    return [n for pfn, count in ranges for n in range(pfn // 512, (pfn + count) // 512)]


def pages(numbers: Iterable[int]) -> RangeSet:
    return RangeSet((n * CHUNK_PAGES, CHUNK_PAGES) for n in numbers)


class GuestKernel:
    """The guest's chunks: each is free, isolated or in use. A chunk in use has contents."""

    def __init__(self) -> None:
        self.free = list(range(CHUNK_COUNT))
        self.isolated: set[int] = set()
        self.reported: set[int] = set()
        """Chunks that are free and hinted: they are hinted again only after they were used."""
        self.busy = True
        """Whether the workload at once uses and frees what is released, so that there is always
        something to hint."""
        self.in_use: dict[int, int] = {}
        self.contents: dict[int, int] = {}
        """What the host holds for a chunk; no entry if it was never used, or was dropped since."""
        self._writes = 0

    def allocate(self) -> None:
        self._writes += 1
        chunk = self.free.pop(0)
        self.reported.discard(chunk)
        self.in_use[chunk] = self.contents[chunk] = self._writes

    def free_one(self) -> None:
        chunk = next(iter(self.in_use))
        del self.in_use[chunk]
        self.free.append(chunk)

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        taken = [n for n in self.free if n not in self.reported]
        # Isolate chunks from the end of the list: `allocate` takes from the start. `release` puts
        # chunks at the start, so they are used next: the worst case if their batch runs too late.
        taken = taken[-min(max_ranges, max_pages // CHUNK_PAGES) :]
        self.free = [n for n in self.free if n not in taken]
        self.isolated |= set(taken)
        return pages(taken)

    def idle(self) -> bool:
        return self.reported.issuperset(self.free)

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        assert set(chunks(ranges)) <= self.isolated, "released what is not isolated"
        self.isolated -= set(chunks(ranges))
        self.reported |= set(chunks(ranges) if hinted and not self.busy else ())
        self.free = chunks(ranges) + self.free


class Agent:
    """A guest agent: carries out the instructions of its core, on the kernel's chunks."""

    def __init__(self, kernel: GuestKernel, core: HintingCore) -> None:
        self.kernel = kernel
        self.core = core
        self.stream: Stream | None = None
        self.old_stream: Stream | None = None

    def connect(self) -> Stream:
        self.stream = Stream()
        self.stream.to_host.append(Hello(self.core.still_isolated))
        return self.stream

    def receive(self) -> None:
        assert self.stream is not None
        message = self.stream.to_guest.popleft()
        if isinstance(message, gate.Welcome):
            self.carry_out(self.core.welcomed(message.session, _LIMITS))
        else:
            self._acknowledged(message)

    def receive_late_ack(self) -> None:
        assert self.old_stream is not None
        message = self.old_stream.to_guest.popleft()
        if isinstance(message, gate.Acknowledge):
            self._acknowledged(message)

    def _acknowledged(self, ack: gate.Acknowledge) -> None:
        batch = ack.batch
        acted = not ack.outcome.skipped
        self.carry_out(self.core.acknowledged(batch.epoch, batch.seq, acted=acted))

    def lose_stream(self) -> None:
        self.old_stream, self.stream = self.stream, None
        self.carry_out(self.core.lost())

    def poll(self) -> None:
        self.carry_out(self.core.period_passed(isolator_idle=self.kernel.idle()))

    def carry_out(self, instructions: Sequence[hinting.Instruction]) -> None:
        todo = deque(instructions)
        while todo:
            match todo.popleft():
                case hinting.Isolate(max_ranges, max_pages):
                    taken = self.kernel.isolate(max_ranges, max_pages)
                    todo += self.core.isolated(taken, isolator_idle=self.kernel.idle())
                case hinting.Send() as batch:
                    assert self.stream is not None
                    self.stream.send(batch)
                case hinting.Release(ranges, hinted):
                    self.kernel.release(ranges, hinted=hinted)


class Host:
    """The host agent's side. It punches one batch at a time, one chunk in each slice."""

    def __init__(self, new_gate: Gate, fence: Fence) -> None:
        self.gate = new_gate
        self.sessions: dict[int, Stream] = {}
        self.unposted: list[gate.Batch] = []
        """Batches that have arrived, and are not in the books yet: they may run."""
        self.running: gate.Batch | None = None
        self.to_drop: list[int] = []
        self.slice: int | None = None
        """The chunk that a system call is dropping."""
        self.fence = fence
        self._entered = contextlib.ExitStack()
        self._permit = 0
        self.turn_asked = False

    def receive(self, stream: Stream, now_s: float, next_session: int) -> None:
        """Receive the next message of a stream, also of one that was cut.

        :param next_session: the number of the session that a Hello opens.
        """
        message = stream.to_host.popleft()
        if isinstance(message, Hello):
            self.sessions[next_session] = stream
            self.carry_out(self.gate.connected(next_session))
        elif session := self._session_of(stream):
            batch = gate.Batch(
                epoch=message.epoch, seq=message.seq, ranges=message.ranges, received_s=now_s
            )
            self.unposted.append(batch)
            self.carry_out(self.gate.arrived(session, batch))

    def leave(self, stream: Stream) -> None:
        """Notice that a stream has ended; messages that did not reach the host yet are lost."""
        session = self._session_of(stream)
        del self.sessions[session]
        stream.lose()
        self.carry_out(self.gate.left(session))

    def take_turn(self, now_s: float) -> None:
        self.turn_asked = False
        self.carry_out(self.gate.turn_came(now_s))

    def begin_slice(self) -> None:
        """Begin the running batch's next slice; if its permit has ended, give up the rest."""
        try:
            self._entered.enter_context(self.fence.inside(self._permit))
            self.slice = self.to_drop.pop()
        except FenceClosed:
            self.to_drop.clear()

    def end_slice(self) -> None:
        self.slice = None
        self._entered.close()

    def qemu_asks_to_stop(self, when_stopped: Callable[[], None]) -> None:
        """Do what the memory door does when QEMU stops the device: close the gate, then the fence.

        :param when_stopped: the fence calls it when no slice runs.
        """
        self.carry_out(self.gate.door_closed(TransientError("stopped")))
        self.fence.close(when_stopped)

    def qemu_starts_again(self) -> None:
        self.fence.open()
        self.carry_out(self.gate.door_opened())

    def finish(self) -> None:
        batch, self.running = self.running, None
        assert batch is not None
        self.carry_out(self.gate.finished(batch, Outcome(reclaimed=PageMap(batch.ranges))))

    def guest_is_gone(self) -> None:
        self.carry_out(self.gate.gone(GuestLost("reset")))
        assert all(one is self.running for one in self.unposted), "a batch may run yet"

    def carry_out(self, instructions: Sequence[gate.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case gate.Welcome(session):
                    assert self.running is None, "I2: a batch is running"
                    assert self.gate.door_is_open, "I5: the door is closed"
                    assert not self.unposted, "I2: a batch may run yet"
                    self.sessions[session].to_guest.append(instruction)
                case gate.EndSession(session):
                    self.sessions[session].cut = True
                case gate.TakeTurn():
                    assert not self.turn_asked, "two turns at once"
                    self.turn_asked = True
                case gate.Run(batch):
                    assert self.running is None, "two punches at once"
                    self.running, self.to_drop = batch, chunks(batch.ranges)
                    self._permit = self.fence.permit()
                case gate.Post(batch):
                    self.unposted.remove(
                        batch
                    )  # raises if the batch was posted before, or has never arrived
                case gate.Acknowledge(session, batch):
                    assert batch not in self.unposted, "acknowledged before it was posted"
                    self.sessions[session].to_guest.append(instruction)

    def _session_of(self, stream: Stream) -> int:
        """Return the number of the session that this host has for the stream; 0 if it has none."""
        return next((n for n, one in self.sessions.items() if one is stream), 0)

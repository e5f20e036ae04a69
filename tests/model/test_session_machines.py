"""The real state machines of guest and host drop no chunk in use, and leave none isolated for ever,
in random orders of events and faults.

The same test must find mistakes like those of session.pml when they are made in the real machines,
or around them: when agents start or die, or the guest is reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from guest_agent import hinting
from guest_agent.hinting import HintingCore
from hintfleet.errors import HintfleetError
from hintfleet.ranges import RangeSet
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.memory.fence import Fence
from host_agent.memory.reclaim import Outcome
from host_agent.session import gate
from host_agent.session.gate import OLDEST_BATCH_S, Gate
from tests.support.session_world import CHUNK_COUNT, Agent, GuestKernel, Host, Stream, pages

LATE_STEP = 20
"""`guest_is_reset` comes only after so many steps: no agent runs in the guest after that."""
MOST_STEPS_TO_REST = 500

Event = Callable[[], None]


class Sessions(RuleBasedStateMachine):
    """One guest, its successive agents, its successive host agents, and the links.

    Two rules, `goes_on` and `fault`, pick among the events that can happen now. So every step does
    something, and faults are rare enough for progress.
    """

    core: type[HintingCore] = HintingCore
    gate: type[Gate] = Gate
    fence: type[Fence] = Fence
    death_releases = False
    agents_share_the_isolator = False
    next_host_agent_waits = True
    reset_keeps_the_ram = False
    comes_to_rest = True

    def __init__(self) -> None:
        super().__init__()
        self.kernel = GuestKernel()
        self.agents: list[Agent] = []
        self.streams: list[Stream] = []
        self.host: Host | None = self.new_host()
        self.predecessor: int | None = None
        """The chunk that the system call of a dead host agent will still drop."""
        self.sessions = self.steps = 0
        self.now_s = 0.0
        self.reset = False
        self.is_stopped = False
        """Whether QEMU has stopped the guest at the memory door."""
        self.asks_to_stop = False
        self.ram_is_open = True

    def new_host(self) -> Host:
        return Host(self.gate(), self.fence())

    @rule(choices=st.lists(st.integers(0, 999), min_size=2, max_size=7))
    def goes_on(self, choices: list[int]) -> None:
        for choice in choices:
            self.one_of([*self.guest_events(), *self.host_events()], choice)

    @rule(choice=st.integers(0, 999))
    def fault(self, choice: int) -> None:
        self.one_of(list(self.faults()), choice)

    def one_of(self, events: list[Event], choice: int) -> None:
        self.steps += 1
        if events:
            event = events[choice % len(events)]
            note(getattr(event, "__qualname__", str(event)))
            event()
        self.workload_goes_on()
        self.check()

    # What the guest does

    def guest_events(self) -> Iterator[Event]:
        if self.is_stopped or self.asks_to_stop:
            return
        if not self.reset and len(self.agents) <= self.agents_share_the_isolator:
            yield self.agent_starts
        for agent in self.agents:
            yield from self.agent_events(agent)

    def workload_goes_on(self) -> None:
        """Allocate a chunk if one is free and less than a third of all is in use; else free one.
        Do nothing while the guest is stopped, or QEMU has begun to stop it."""
        if self.is_stopped or self.asks_to_stop:
            return
        if self.kernel.free and len(self.kernel.in_use) < CHUNK_COUNT // 3:
            self.kernel.allocate()
        elif self.kernel.in_use:
            self.kernel.free_one()

    def agent_starts(self) -> None:
        """Start an agent, which learns what an earlier one left isolated (I4)."""
        self.agents.append(Agent(self.kernel, self.core(pages(self.kernel.isolated))))

    def agent_events(self, agent: Agent) -> Iterator[Event]:
        if agent.stream is None:
            yield lambda: self.streams.append(agent.connect())
        else:
            if agent.stream.to_guest:
                yield agent.receive
            if agent.stream.cut:
                yield agent.lose_stream
        if agent.core.state is hinting.State.OPEN:
            if agent.old_stream and agent.old_stream.to_guest:
                yield agent.receive_late_ack
            if not self.kernel.idle():
                yield agent.poll

    # What the host does

    def host_events(self) -> Iterator[Event]:
        if self.asks_to_stop and self.host is None and self.predecessor is None:
            yield self.qemu_has_stopped_the_guest
        if self.is_stopped:
            yield self.guest_goes_on
        if self.host is not None:
            yield from self.host_agent_events(self.host)
        elif not self.reset and (self.predecessor is None or not self.next_host_agent_waits):
            yield self.next_host_agent_adopts_the_guest

    def host_agent_events(self, host: Host) -> Iterator[Event]:
        if host.running:
            yield self.host_punches
        elif host.turn_asked:
            yield from (self.host_takes_its_turn,) * 3
            yield self.host_takes_its_turn_late
        for stream in self.streams:
            # Among `self.streams` are streams that were cut: their messages arrive late.
            if stream.to_host:
                yield partial(self.host_hears, stream)
        for stream in host.sessions.values():
            if stream.cut and not stream.to_host:
                yield partial(host.leave, stream)
        if self.reset and self.ram_is_open:
            yield self.host_hears_of_the_reset

    @property
    def present_host(self) -> Host:
        assert self.host is not None
        return self.host

    def host_hears(self, stream: Stream) -> None:
        self.sessions += 1
        self.present_host.receive(stream, self.now_s, self.sessions)

    def host_takes_its_turn(self) -> None:
        self.present_host.take_turn(self.now_s)

    def host_takes_its_turn_late(self) -> None:
        self.now_s += 2 * OLDEST_BATCH_S
        self.present_host.take_turn(self.now_s)

    def host_punches(self) -> None:
        """Take the next step of the running batch: drop the chunk of the slice that has begun, or
        begin the next slice, or finish the batch (with an ack, if a session is open)."""
        host = self.present_host
        if host.slice is not None:
            self.drop(host.slice)
            host.end_slice()
        elif host.to_drop:
            host.begin_slice()
        else:
            host.finish()

    def qemu_has_stopped_the_guest(self) -> None:
        self.asks_to_stop, self.is_stopped = False, True

    def guest_goes_on(self) -> None:
        """Let a stopped guest run again."""
        self.is_stopped = False
        if self.host is not None:
            self.host.qemu_starts_again()

    def kernel_finishes_a_dead_host_agents_punch(self) -> None:
        chunk, self.predecessor = self.predecessor, None
        assert chunk is not None
        self.drop(chunk)

    def next_host_agent_adopts_the_guest(self) -> None:
        self.host = self.new_host()
        if self.asks_to_stop or self.is_stopped:
            self.asks_to_stop, self.is_stopped = False, True
            self.host.qemu_asks_to_stop(lambda: None)

    def host_hears_of_the_reset(self) -> None:
        """Have the host agent learn that the guest was reset: it ends the guest, and closes its RAM
        if no batch is running. If one is, this event stays possible, and closes the RAM later."""
        self.present_host.guest_is_gone()
        self.ram_is_open = bool(self.present_host.running)

    # Faults

    def faults(self) -> Iterator[Event]:
        """Yield the faults that can happen now. Some are yielded twice when they would interrupt
        something, so that they are picked more often."""
        for agent in self.agents:
            yield partial(self.agent_dies, agent)
            if (stream := agent.stream) is not None:
                yield from (partial(self.link_is_cut, stream),) * (2 if stream.to_guest else 1)
        for stream in self.streams:
            if stream.cut and stream.to_host:
                yield stream.lose
        if self.predecessor is not None:
            yield self.kernel_finishes_a_dead_host_agents_punch
        if self.host is not None:
            yield from (self.host_agent_dies,) * (2 if self.host.to_drop else 1)
            yield self.another_says_hello_in_the_guests_name
        yield from self.faults_of_the_guest()

    def faults_of_the_guest(self) -> Iterator[Event]:
        if self.agents and not self.kernel.isolated:
            yield self.guest_boots_again_in_good_order
        if not self.reset and not self.is_stopped and not self.asks_to_stop:
            yield from (self.qemu_stops_the_guest,) * (2 if self.host and self.host.running else 1)
        if self.is_stopped and not self.reset:
            yield self.guest_is_reset_and_keeps_its_ram
            yield self.guest_is_put_back
        if not self.reset and self.host is not None and self.steps > LATE_STEP:
            yield from (self.guest_is_reset,) * (2 if self.host.turn_asked else 1)

    def agent_dies(self, agent: Agent) -> None:
        self.agents.remove(agent)
        if agent.stream is not None:
            agent.stream.cut = True
        if self.death_releases:
            self.kernel.release(pages(self.kernel.isolated), hinted=False)

    def link_is_cut(self, stream: Stream) -> None:
        """Cut a link. Each end notices that later; messages that were sent before arrive late, or
        never."""
        stream.cut = True

    def host_agent_dies(self) -> None:
        """Kill the host agent: the kernel finishes its current system call later."""
        self.predecessor = self.present_host.slice
        for stream in self.present_host.sessions.values():
            stream.cut = True
            stream.lose()
        self.host = None

    def another_says_hello_in_the_guests_name(self) -> None:
        """Send a Hello in the guest's name, on a stream that is cut at once. It stands for an
        impostor, and for a Hello of the guest that arrives very late."""
        self.streams.append(Agent(self.kernel, HintingCore()).connect())
        self.streams[-1].cut = True

    def guest_boots_again_in_good_order(self) -> None:
        """Boot again in the same RAM while nothing is isolated, as by kexec. The host learns of it
        only from the next Hello."""
        for agent in list(self.agents):
            self.agent_dies(agent)
        contents = self.kernel.contents
        self.kernel = GuestKernel()
        self.kernel.contents = contents

    def qemu_stops_the_guest(self) -> None:
        """Have QEMU begin to stop the guest. QEMU waits for the host agent's answer; if there is no
        host agent, until no system call of a dead one runs."""
        self.asks_to_stop = True
        if self.host is not None:
            self.host.qemu_asks_to_stop(partial(self.qemu_is_answered, self.host))

    def qemu_is_answered(self, host: Host) -> None:
        if host is self.host:  # a dead host agent does not answer
            self.qemu_has_stopped_the_guest()

    def guest_is_reset_and_keeps_its_ram(self) -> None:
        """Reset a stopped guest. It boots again in the same RAM, and may use any chunk of it."""
        self.guest_begins_anew(GuestKernel())

    def guest_is_put_back(self) -> None:
        """Revert a stopped guest to an older state, in which an earlier agent had isolated some
        chunks."""
        kernel = GuestKernel()
        kernel.isolate(3, 3 * 512)
        self.guest_begins_anew(kernel)

    def guest_begins_anew(self, kernel: GuestKernel) -> None:
        for agent in list(self.agents):
            self.agent_dies(agent)
        self.kernel = kernel
        while len(self.kernel.free) > CHUNK_COUNT // 2:
            self.kernel.allocate()
        self.guest_goes_on()

    def guest_is_reset(self) -> None:
        """Reset the guest: its memory is not used any more, and the host learns of it later. With
        `reset_keeps_the_ram`, which is a mistake, a new kernel uses all of the memory."""
        self.reset = True
        for agent in list(self.agents):
            self.agent_dies(agent)
        if self.reset_keeps_the_ram:
            self.kernel = GuestKernel()
            while self.kernel.free:
                self.kernel.allocate()

    # What must hold

    def drop(self, chunk: int) -> None:
        assert self.ram_is_open, "punched into a closed RAM file, which may be another file by now"
        if not self.reset or self.reset_keeps_the_ram:
            assert chunk not in self.kernel.in_use, "a chunk in use was dropped"
            assert chunk not in self.kernel.free, "I1: dropped, and not isolated any more"
            self.kernel.contents.pop(chunk, None)

    def check(self) -> None:
        assert self.kernel.in_use.items() <= self.kernel.contents.items()
        if len(self.agents) == 1:
            told = self.agents[0].core.still_isolated
            assert told == pages(self.kernel.isolated), (
                "I4: the agent does not know all that is isolated"
            )

    def teardown(self) -> None:
        """Unless `reset` is set or `comes_to_rest` is false: continue without faults, then
        check that no chunk is isolated any more, and that no batch is missing in the books."""
        if self.reset or not self.comes_to_rest:
            return
        self.kernel.busy = False
        if self.predecessor is not None:
            self.kernel_finishes_a_dead_host_agents_punch()
        for _ in range(MOST_STEPS_TO_REST):
            if events := self.necessary_events():
                events[-1]()
                self.check()
        assert not self.kernel.isolated, "isolated for ever"
        assert not self.host or not self.host.unposted, "missing in the books"

    def necessary_events(self) -> list[Event]:
        """Return the events that can happen now, except faults, late turns and polls."""
        by_chance = {
            self.host_takes_its_turn_late,
            *(agent.poll for agent in self.agents),
        }
        events = [*self.guest_events(), *self.host_events()]
        return [event for event in events if event not in by_chance]


BUDGET = settings(
    max_examples=200,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_order_of_events_drops_a_chunk_in_use_or_leaves_one_isolated() -> None:
    run_state_machine_as_test(Sessions, settings=BUDGET)


# The guest's mistakes


class ReleasesBeforeAck(HintingCore):
    def isolated(
        self, ranges: RangeSet, *, isolator_idle: bool, unfinished: bool = False
    ) -> Sequence[hinting.Instruction]:
        instructions = super().isolated(ranges, isolator_idle=isolator_idle, unfinished=unfinished)
        return [*instructions, *([hinting.Release(ranges, hinted=True)] if ranges else [])]

    def acknowledged(self, epoch: int, seq: int, *, acted: bool) -> Sequence[hinting.Instruction]:
        instructions = super().acknowledged(epoch, seq, acted=acted)
        return [one for one in instructions if not isinstance(one, hinting.Release)]


class LostLinkReleases(HintingCore):
    def lost(self) -> Sequence[hinting.Instruction]:
        super().lost()
        released, self._awaiting_welcome = self._awaiting_welcome, []
        return [hinting.Release(ranges, hinted=False) for ranges in released]

    def welcomed(self, epoch: int, limits: hinting.Limits) -> Sequence[hinting.Instruction]:
        return [*self.lost(), *super().welcomed(epoch, limits)]


class TakesAcksOfOldEpochs(HintingCore):
    def acknowledged(self, epoch: int, seq: int, *, acted: bool) -> Sequence[hinting.Instruction]:
        if seq not in self._in_flight:
            return []
        return super().acknowledged(self._epoch, seq, acted=acted)


class ForgetsWhatWasLeft(HintingCore):
    def __init__(self, still_isolated: RangeSet) -> None:
        super().__init__()


# The host's mistakes


class WelcomesWhileABatchRuns(Gate):
    def _welcome(self) -> Sequence[gate.Instruction]:
        running, self.running = self.running, None
        instructions = super()._welcome()
        self.running = running
        return instructions


class WaitingOutlivesItsEpoch(Gate):
    def _close(self, reason: pb.SkipReason.ValueType) -> Sequence[gate.Instruction]:
        waiting, self._waiting = self._waiting, deque()
        super()._close(reason)
        self._waiting = waiting
        return []

    def _why_skip(self, batch: gate.Batch, now_s: float) -> None:
        return None


class TakesBatchesOfOldSessions(Gate):
    def arrived(self, session: int, batch: gate.Batch) -> Sequence[gate.Instruction]:
        self._waiting.append(batch)
        return self._ask_for_turn()

    def _why_skip(self, batch: gate.Batch, now_s: float) -> None:
        return None


class AcknowledgesBeforeThePunch(Gate):
    def turn_came(self, now_s: float) -> Sequence[gate.Instruction]:
        instructions = super().turn_came(now_s)
        if self.running is None:
            return instructions
        return [gate.Acknowledge(self.epoch, self.running, Outcome()), *instructions]

    def finished(self, batch: gate.Batch, outcome: Outcome) -> Sequence[gate.Instruction]:
        instructions = super().finished(batch, outcome)
        return [one for one in instructions if not isinstance(one, gate.Acknowledge)]


class RunsAfterAReset(Gate):
    def gone(self, error: HintfleetError) -> Sequence[gate.Instruction]:
        return []


class EpochOutlivesTheStop(Gate):
    def door_closed(self, error: HintfleetError) -> Sequence[gate.Instruction]:
        return []


class SkipsWithoutAWord(Gate):
    def _done(self, batch: gate.Batch, outcome: Outcome) -> Sequence[gate.Instruction]:
        instructions = super()._done(batch, outcome)
        return instructions[:1] if outcome.skipped else instructions


class AnswersBeforeThePunchIsOver(Fence):
    def close(self, when_empty: Callable[[], object]) -> None:
        super().close(lambda: None)
        when_empty()


class GoesOnWhenTheDoorOpens(Fence):
    def permit(self) -> int:
        return 0

    @contextmanager
    def inside(self, permit: int) -> Iterator[None]:
        with super().inside(super().permit()):
            yield


class PunchesAfterTheAnswer(GoesOnWhenTheDoorOpens):
    def close(self, when_empty: Callable[[], object]) -> None:
        super().close(when_empty)
        self.open()


MUTATIONS: dict[str, dict[str, object]] = {
    **{
        fence.__name__: {"fence": fence}
        for fence in (AnswersBeforeThePunchIsOver, GoesOnWhenTheDoorOpens, PunchesAfterTheAnswer)
    },
    **{
        core.__name__: {"core": core}
        for core in (ReleasesBeforeAck, LostLinkReleases, TakesAcksOfOldEpochs, ForgetsWhatWasLeft)
    },
    **{
        one.__name__: {"gate": one}
        for one in (
            WelcomesWhileABatchRuns,
            WaitingOutlivesItsEpoch,
            TakesBatchesOfOldSessions,
            AcknowledgesBeforeThePunch,
            RunsAfterAReset,
            EpochOutlivesTheStop,
            SkipsWithoutAWord,
        )
    },
    # Mistakes outside of the state machines: when agents start or die, or the guest is reset.
    "DeathReleases": {"death_releases": True},
    # This one never comes to rest: two agents supersede each other for ever.
    "AgentsShareTheIsolator": {"agents_share_the_isolator": True, "comes_to_rest": False},
    "NextHostAgentDoesNotWait": {"next_host_agent_waits": False},
    "ResetKeepsTheRam": {"reset_keeps_the_ram": True},
}


# Mutations that are hard to find: they take 300 examples on average, sometimes 1,500. These seeds
# find them soon. Where they do not, after a change of a state machine or with another version of
# Hypothesis, the test takes longer.
SEEDS = {
    "AnswersBeforeThePunchIsOver": 3,
    "EpochOutlivesTheStop": 11,
    "GoesOnWhenTheDoorOpens": 20,
    "TakesAcksOfOldEpochs": 9,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_of_the_machines_is_found(mutation: str) -> None:
    mutated = type(mutation, (Sessions,), MUTATIONS[mutation])
    if mutation in SEEDS:
        seed(SEEDS[mutation])(mutated)
    with pytest.raises((AssertionError, HintfleetError)) as found:
        run_state_machine_as_test(mutated, settings=settings(BUDGET, max_examples=6000))
    print(f"{mutation}: {found.value}")

"""What a failed command means for a trial: on a busy host, the sample that shows that the host ran
out of memory may come later than the error; a host whose machine or link is down sends nothing.
Also a trial that is cut off while it ends."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from hintfleet.errors import GuestLost, OutcomeUnknown
from hintfleet.units import GIB
from hintfleet.v1 import host_pb2
from orchestrator.spec import file as spec_file
from orchestrator.spec.model import Spec
from orchestrator.trial import host_client, runner
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.plan import HostTask, host_tasks, plan_trials
from orchestrator.trial.records import Event, HostDone, HostSamples, StepDone
from orchestrator.trial.runner import run_host_task
from orchestrator.trial.script import cancelled
from tests.support.fake_host_service import start
from tests.support.relay import Address, Relay

_HANG_S = 120
TEXT = (
    "name: s\ndriver: embedded\nhosts: {count: 1, memory: 1GiB}\n"
    "guests: {per_host: 1, memory: 64MiB}\nworkload: {phases: [{allocate: 16MiB, for: 1s}]}\n"
    "arms: [{name: none, method: none}]\nsample_period: 50ms\ntimeouts: {connect: 1s}\n"
)


def parsed(text: str) -> tuple[Spec, HostTask]:
    spec = spec_file.parse(text, "spec.yaml").spec
    (task,) = host_tasks(spec, plan_trials(spec, "run1")[0]).values()
    return spec, task


SPEC, TASK = parsed(TEXT)


class BusyHost:
    """A host agent whose guest is killed in its first step. Afterwards it sends one set of samples
    that still says `oom_count` 0, and nothing for 1.5 s; then samples again.

    :ivar oom_count: what the samples say after these 1.5 s.
    """

    def __init__(self, oom_count: int) -> None:
        self.oom_count = oom_count
        self._killed = asyncio.Event()

    async def watch(self, _trial_id: str, period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        for number in itertools.count():
            if self._killed.is_set() and number:
                yield self._samples(0)
                await asyncio.sleep(1.5)
                break
            yield self._samples(0)
            await asyncio.sleep(period_s)
        while True:
            yield self._samples(self.oom_count)
            await asyncio.sleep(period_s)

    def _samples(self, oom_count: int) -> host_pb2.SampleSet:
        name = TASK.guests[0].name
        use = host_pb2.BudgetUse(
            used_bytes=GIB, limit_bytes=GIB, enforced=True, oom_count=oom_count
        )
        return host_pb2.SampleSet(
            at_unix_us=time.time_ns() // 1000,
            samples=[host_pb2.Sample(guest_name=name)],
            budget_use=use,
        )

    async def create_guest(self, request: host_pb2.CreateGuestRequest) -> host_pb2.Guest:
        return host_pb2.Guest(name=request.name)

    async def run_step(self, _request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        self._killed.set()
        raise GuestLost("its process ended with status -9")


async def last_record(client: object, task: HostTask = TASK) -> HostDone:
    """Run the trial on a host; return its last record."""
    records = [record async for record in run_host_task(cast(HostClient, client), task)]
    assert isinstance(records[-1], HostDone)
    return records[-1]


@pytest.mark.parametrize(
    ("oom_count", "why"),
    [(1, "host1: ran out of memory"), (0, "its process ended with status -9")],
)
def test_whether_the_host_ran_out_is_told_by_samples_of_after_the_error(
    oom_count: int, why: str
) -> None:
    done = asyncio.run(last_record(BusyHost(oom_count)))
    assert done.undecided.startswith(why)
    assert not done.lost


class SilentHost(BusyHost):
    """A host agent that sends no samples after its first step, which has no answer; the watch stays
    open. If it is not `silent`, it still answers other calls."""

    def __init__(self, silent: bool) -> None:
        super().__init__(0)
        self._silent = silent

    async def watch(self, _trial_id: str, period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        while not self._killed.is_set():
            yield self._samples(0)
            await asyncio.sleep(period_s)
        await asyncio.Event().wait()

    async def run_step(self, _request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        self._killed.set()
        raise OutcomeUnknown("allocate_bytes: Deadline Exceeded")

    async def is_silent(self) -> bool:
        return self._silent


class HostWithAnotherTime(BusyHost):
    """A host agent whose clock is set back by an hour during its first step."""

    async def watch(self, _trial_id: str, period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        while True:
            samples = self._samples(0)
            samples.at_unix_us -= 3_600_000_000 if self._killed.is_set() else 0
            yield samples
            await asyncio.sleep(period_s)

    async def run_step(self, _request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        self._killed.set()
        await asyncio.Event().wait()
        raise AssertionError


def test_a_trial_runs_again_if_the_clock_is_set_back() -> None:
    """Its samples would be in the wrong order."""
    done = asyncio.run(last_record(HostWithAnotherTime(0)))
    assert done.undecided.endswith("host1: its clock was set back")
    assert done.lost


@pytest.mark.parametrize("silent", [True, False])
def test_a_host_that_falls_silent_is_lost(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection breaks if a machine loses its power."""
    monkeypatch.setattr(runner, "_SAMPLE_TIMEOUT_S", 0.2)
    done = asyncio.run(last_record(SilentHost(silent)))
    assert "Deadline Exceeded" in done.undecided
    assert done.lost == silent


class HostThatNeverBegins(SilentHost):
    """A host agent that answers, and still ends the guests of an earlier trial."""

    async def watch(self, _trial_id: str, _period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        await asyncio.Event().wait()
        yield self._samples(0)


def test_a_trial_that_has_not_begun_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method under test cannot be the cause, so it is run again."""
    monkeypatch.setattr(runner, "_SAMPLE_TIMEOUT_S", 0.2)
    _, task = parsed(TEXT.replace("connect: 1s", "connect: 1s, create: 100ms, destroy: 100ms"))
    done = asyncio.run(last_record(HostThatNeverBegins(silent=False), task))
    assert "no samples from the host agent" in done.undecided
    assert done.lost


class HostThatStops(SilentHost):
    """A host agent that does a step, and sends no samples afterwards."""

    async def run_step(self, _request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        self._killed.set()
        return host_pb2.RunStepResponse(done_at_unix_us=time.time_ns() // 1000 + 1_000_000)


class HostWithADeadGuest(HostThatStops):
    """A host agent that does a step, and goes on sampling without its guest."""

    async def watch(self, _trial_id: str, period_s: float) -> AsyncIterator[host_pb2.SampleSet]:
        while True:
            samples = self._samples(0)
            if self._killed.is_set():
                samples.at_unix_us += 2_000_000
                samples.ClearField("samples")
            yield samples
            await asyncio.sleep(period_s)


@pytest.mark.parametrize(
    ("host", "said", "lost"),
    [(HostThatStops, "no sample of", True), (HostWithADeadGuest, "sends no samples", False)],
)
def test_a_guest_of_which_no_sample_says_whether_it_fits(
    host: type[HostThatStops], said: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the host stands still, the method under test is not the cause. If only the guest is gone,
    it may be: run again until it ends well, it would look good."""
    monkeypatch.setattr(runner, "_SAMPLE_TIMEOUT_S", 0.2)
    _, task = parsed(TEXT.replace("memory: 64MiB", "memory: 64MiB, start: one by one"))
    done = asyncio.run(last_record(host(silent=False), task))
    assert said in done.undecided
    assert done.lost == lost


@asynccontextmanager
async def host_elsewhere() -> AsyncIterator[tuple[HostClient, Relay]]:
    """Yield the client of a host agent, and the relay between them."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    server = await start(f"127.0.0.1:{port}")
    relay = Relay()
    relay.upstream = Address(host="127.0.0.1", port=port)
    async with relay.serving() as address:
        client = HostClient(str(address), SPEC.timeouts)
        await client.get_host(host_pb2.EMBEDDED, wait=True)
        try:
            yield client, relay
        finally:
            await client.aclose()
            await server.stop(None)


@pytest.mark.parametrize("stalls", [True, False])
def test_whether_a_host_agent_is_silent(stalls: bool) -> None:
    async def is_silent() -> bool:
        async with host_elsewhere() as (client, relay):
            for link in relay.links if stalls else ():
                link.stall()
            return await client.is_silent()

    assert asyncio.run(is_silent()) == stalls


def test_a_host_whose_power_is_cut_is_missed_before_the_hold_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soon = tuple((option, 1000) for option, _ in host_client._KEEPALIVE)
    monkeypatch.setattr(host_client, "_KEEPALIVE", soon)
    _, task = parsed(TEXT.replace("for: 1s", "for: 7d"))

    async def records() -> list[Event | HostSamples]:
        found = []
        async with asyncio.timeout(_HANG_S), host_elsewhere() as (client, relay):
            async for record in run_host_task(client, task):
                found.append(record)
                for link in relay.links if isinstance(record, StepDone) else ():
                    link.stall()
        return found

    done = asyncio.run(records())[-1]
    assert isinstance(done, HostDone)
    assert done.lost


def test_a_task_that_is_cancelled_while_it_cancels_others_does_not_go_on() -> None:
    """Else a trial that is cut off could go on to read back all guests."""

    async def cut_off() -> None:
        ending = asyncio.Event()

        async def job() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ending.set()
                await asyncio.sleep(0.05)

        jobs = [asyncio.create_task(job()) for _ in range(2)]
        await asyncio.sleep(0)
        caller = asyncio.create_task(cancelled(*jobs))
        await ending.wait()
        caller.cancel()
        await asyncio.wait((caller,))
        assert caller.cancelled()
        assert all(one.cancelled() for one in jobs)

    asyncio.run(cut_off())

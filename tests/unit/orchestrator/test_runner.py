"""Why a trial is undecided if a guest is lost: on a busy host, the sample that shows that the host
ran out of memory comes later than the error of the guest's command."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import cast

import pytest

from hintfleet.errors import GuestLost
from hintfleet.units import GIB
from hintfleet.v1 import host_pb2
from orchestrator.spec import file as spec_file
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.plan import host_tasks, plan_trials
from orchestrator.trial.records import HostDone
from orchestrator.trial.runner import run_host_task

SPEC = spec_file.parse(
    "name: s\ndriver: embedded\nhosts: {count: 1, memory: 1GiB}\n"
    "guests: {per_host: 1, memory: 64MiB}\nworkload: {phases: [{allocate: 16MiB, for: 1s}]}\n"
    "arms: [{name: none, method: none}]\nsample_period: 50ms\n",
    "spec.yaml",
).spec
(TASK,) = host_tasks(SPEC, plan_trials(SPEC, "run1")[0]).values()


class BusyHost:
    """A host agent whose guest is killed in its first step. Afterwards it sends one set of samples
    that was made before, and nothing for 1.5 s; then samples again.

    :ivar oom_count: what the samples say after the guest was killed.
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

    async def create_guest(self, _request: host_pb2.CreateGuestRequest) -> None:
        """Do nothing: the guest is a name only."""

    async def run_step(self, _request: host_pb2.RunStepRequest) -> host_pb2.RunStepResponse:
        self._killed.set()
        raise GuestLost("its process ended with status -9")


@pytest.mark.parametrize(
    ("oom_count", "why"),
    [(1, "host1: ran out of memory"), (0, "its process ended with status -9")],
)
def test_whether_the_host_ran_out_is_told_by_samples_of_after_the_error(
    oom_count: int, why: str
) -> None:
    async def last() -> object:
        client = cast(HostClient, BusyHost(oom_count))
        return [record async for record in run_host_task(client, TASK)][-1]

    done = asyncio.run(last())
    assert isinstance(done, HostDone)
    assert done.undecided.startswith(why)
    assert not done.lost

"""The hosts of one actor run side by side; their records come in batches. The host agents are gRPC
servers in this process (tests/support/fake_host_service.py); one test begins to start real ones."""

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc.aio
import pytest

from hintfleet.errors import HintfleetError
from hintfleet.system.processes import other_processes
from hintfleet.units import GIB
from orchestrator.spec import file as spec_file
from orchestrator.spec.guests import Guests, Start
from orchestrator.trial.host_group import HostGroup
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.host_process import LogicalHost
from orchestrator.trial.plan import host_tasks, plan_trials
from orchestrator.trial.records import GuestFits, HostDone, Record, Samples, StepDone
from tests.support.fake_host_service import start

HOSTS = ("host1", "host2", "host3")
SPEC = spec_file.parse(
    "name: s\ndriver: embedded\nhosts: {count: 3, memory: 1GiB}\n"
    "guests: {per_host: 2, memory: 64MiB}\nworkload: {phases: [{allocate: 16MiB, for: 1s}]}\n"
    "arms: [{name: none, method: none}]\nsample_period: 50ms\ntimeouts: {connect: 2s}\n",
    "spec.yaml",
).spec
TASKS = host_tasks(SPEC, plan_trials(SPEC, "run1")[0])


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hf-test-") as made:  # a short path, for sockets
        yield Path(made)


def places(folder: Path) -> list[HostPlace]:
    return [
        HostPlace(
            name=name,
            driver=SPEC.driver,
            memory_needed_bytes=SPEC.classes[0].memory_bytes,
            timeouts=SPEC.timeouts,
            address=f"unix:{folder}/{name}",
        )
        for name in HOSTS
    ]


async def run(folder: Path, loses: str = "", pause_s: float = 0.0) -> list[Sequence[Record]]:
    """Run a trial; return its records, in the batches in which they came.

    :param loses: the host whose host agent ends when its first step is done.
    :param pause_s: how long to wait after each batch before taking the next.
    """
    servers: dict[str, grpc.aio.Server] = {}

    def step_done(name: str) -> None:
        if name == loses:
            stopping.append(asyncio.create_task(servers[name].stop(None)))

    stopping: list[asyncio.Task[None]] = []
    for place in places(folder):
        servers[place.name] = await start(place.address, partial(step_done, place.name))
    group = HostGroup(places(folder), None)
    try:
        await group.open()
        batches: list[Sequence[Record]] = []
        async for batch in group.run(list(TASKS.values())):
            batches.append(batch)
            await asyncio.sleep(pause_s)
        return batches
    finally:
        await group.close()
        await group.close()
        await asyncio.gather(*stopping, *(server.stop(None) for server in servers.values()))


def ends(batches: list[Sequence[Record]]) -> dict[str, bool]:
    """Return the hosts that are done, and whether each was lost."""
    records = [record for batch in batches for record in batch]
    return {r.host: r.lost for r in records if isinstance(r, HostDone)}


def test_samples_of_all_hosts_come_together(folder: Path) -> None:
    batches = asyncio.run(run(folder))
    assert ends(batches) == dict.fromkeys(HOSTS, False)
    samples = [record for batch in batches for record in batch if isinstance(record, Samples)]
    later = [record for batch in batches for record in batch[1:]]
    assert not any(isinstance(record, Samples) for record in later), "events come after samples"
    assert max(len(set(each.columns["host"])) for each in samples) == 3, "in one record"
    rows = [row for each in samples for row in zip(*each.columns.values(), strict=True)]
    names = list(samples[0].columns)
    for host in HOSTS:
        of_guest = [
            dict(zip(names, row, strict=True))
            for row in rows
            if row[:2] == (host, f"{host}-guest1")
        ]
        numbers = [row["batches"] for row in of_guest]
        assert numbers == list(range(1, len(numbers) + 1)), "none is lost, and their order is kept"
        assert len(numbers) > 10
        assert {row["resident_bytes"] for row in of_guest} == {0, 16 << 20}
    steps = [record for batch in batches for record in batch if isinstance(record, StepDone)]
    assert len(steps) == 2 * 3 * len(("allocate", "verify"))


def test_nothing_is_lost_if_batches_are_taken_late(folder: Path) -> None:
    """The hosts are done while nobody waits for a batch."""
    assert ends(asyncio.run(run(folder, pause_s=3))) == dict.fromkeys(HOSTS, False)


def test_a_host_that_is_lost_leaves_the_others_alone(folder: Path) -> None:
    assert ends(asyncio.run(run(folder, loses="host2"))) == {
        "host1": False,
        "host2": True,
        "host3": False,
    }


def test_a_host_that_cannot_be_reached_is_named(folder: Path) -> None:
    async def open_without_one() -> None:
        there = [await start(place.address) for place in places(folder)[:2]]
        group = HostGroup(places(folder), None)
        try:
            await group.open()
        finally:
            await group.close()
            await asyncio.gather(*(server.stop(None) for server in there))

    with pytest.raises(HintfleetError, match=f"unix:{folder}/host3: GetHost: "):
        asyncio.run(open_without_one())


def test_no_host_is_started_after_the_end(folder: Path) -> None:
    """Some host agents are about to be started when the actor is told to stop."""

    async def stop_while_opening() -> None:
        logical = [
            replace(
                place,
                address="",
                logical=LogicalHost(name=place.name, memory_budget_bytes=GIB, driver=SPEC.driver),
            )
            for place in places(folder)
        ]
        group = HostGroup(logical, folder / "hosts")
        opening = asyncio.create_task(group.open())
        await asyncio.sleep(0.2)
        await group.close()
        with suppress(asyncio.CancelledError):
            await opening
        await asyncio.sleep(1)

    asyncio.run(stop_while_opening())
    assert not any(str(folder) in " ".join(found.argv) for found in other_processes())
    assert not list((folder / "hosts").glob("*"))


def test_a_guest_that_no_sample_shows_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.trial.runner._SAMPLE_TIMEOUT_S", 0.5)
    assert isinstance(SPEC.guests, Guests)
    guests = SPEC.guests.model_copy(update={"start": Start.ONE_BY_ONE})
    spec = SPEC.model_copy(update={"guests": guests})
    (task, *_) = host_tasks(spec, plan_trials(spec, "run1")[0]).values()
    steps: list[None] = []

    async def run_without_samples() -> list[Record]:
        place = places(folder)[0]
        server = await start(place.address, lambda: steps.append(None), lambda: not steps)
        group = HostGroup([place], None)
        await group.open()
        records = [record async for batch in group.run([task]) for record in batch]
        await group.close()
        await server.stop(None)
        return records

    records = asyncio.run(run_without_samples())
    assert not [record for record in records if isinstance(record, GuestFits)]
    (done,) = (record for record in records if isinstance(record, HostDone))
    assert "no sample of host1-guest1" in done.undecided


def test_a_trial_that_is_cut_off_ends(folder: Path) -> None:
    def runners() -> list[str]:
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        return [name for name in names if name.startswith("_TrialRunner.")]

    async def cut_off() -> None:
        servers = [await start(place.address) for place in places(folder)]
        group = HostGroup(places(folder), None)
        await group.open()
        async with aclosing(group.run(list(TASKS.values()))) as batches:
            await anext(batches)
            assert len(runners()) >= 3
        assert not runners()
        await group.close()
        await asyncio.gather(*(server.stop(None) for server in servers))

    asyncio.run(cut_off())

"""A run: guests at work, faults on every one of them at once, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from hintfleet.v1 import host_pb2
from tests.support.relay import Address, Relay, Way
from tests.torture.guest import Victim
from tests.torture.host import HostAgent
from tests.torture.injectors import Injector, Missed, Scene
from tests.torture.place import TRIAL, Patience, Place
from tests.torture.plan import Fault, Kind, Moment, Pace, faults
from tests.torture.report import Report

if TYPE_CHECKING:  # it is in the stubs only
    from hintfleet.v1.host_pb2_grpc import HostServiceAsyncStub

_WAYS = {Moment.GUEST_SPEAKS: Way.TO_HOST, Moment.HOST_SPEAKS: Way.TO_GUEST}
_LOOK_S = 0.1
_WATCH_PERIOD_MS = 200


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What kind of guests are tortured, and how.

    :ivar guests: what is made, by the name of its place.
    :ivar kinds: how often each kind of fault is dealt to a guest.
    :ivar host_kinds: the same for their host agent.
    :ivar injectors: what each kind does here.
    :ivar advertise: how guests reach a relay that listens there.
    :ivar victim_of: takes hold of a guest that was made.
    :ivar longest_wait_s: for a fault's moment.
    :ivar back_s: how long a guest is waited for after a fault, so that the next strikes one
        that works. It is back when it is connected, or only when it has answered a step.
    :ivar busy_share: how much of a guest's memory its workload uses.
    :ivar environment: more for the host agent.
    """

    driver: str
    guests: Mapping[str, host_pb2.GuestSpec]
    kinds: Mapping[Kind, int]
    host_kinds: Mapping[Kind, int]
    injectors: Mapping[Kind, Callable[[Scene], Injector]]
    pace: Pace
    patience: Patience
    advertise: Callable[[Address], str]
    victim_of: Callable[[host_pb2.Guest, Relay], Victim]
    longest_wait_s: float
    back_s: float = 1.0
    back_means_answered: bool = False
    busy_share: float = 0.7
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Until:
    """When to stop injecting: after so long, with so many faults if that is sooner, and at
    the first wrong page, while what led to it is fresh."""

    seconds: float
    faults: float = float("inf")

    def reached(self, report: Report) -> bool:
        return (
            report.elapsed_s >= self.seconds
            or report.fault_count >= self.faults
            or report.wrong_pages > 0
        )


async def torture(
    setting: Setting,
    seed: int,
    until: Until,
    *,
    progress: Callable[[Report], None] = lambda _: None,
    host_module: str = "tests.torture.patient_host",
) -> Report:
    """Run, and say what happened.

    :param progress: called now and then.
    :param host_module: what is run as the host agent.
    """
    report = Report(driver=setting.driver, seed=seed, guest_count=len(setting.guests))
    relay = Relay()
    with tempfile.TemporaryDirectory(prefix="hf-torture-") as folder:
        Path(folder).chmod(0o711)
        async with relay.serving() as address:
            host = HostAgent(
                Path(folder), relay, setting.advertise(address), host_module, setting.environment
            )
            async with host.running() as stub:
                await _Run(setting, seed, report, relay, host, stub).run(until, progress)
            report.connections = relay.link_count
        for left in host.left_behind():
            report.problem(f"left behind: {left}")
    return report


class _Run:
    def __init__(
        self,
        setting: Setting,
        seed: int,
        report: Report,
        relay: Relay,
        host: HostAgent,
        stub: HostServiceAsyncStub,
    ) -> None:
        self._setting = setting
        self._seed = seed
        self._report = report
        self._relay = relay
        self._host = host
        self._stub = stub
        self._random = random.Random(f"{seed} who")
        self._stop = asyncio.Event()
        self._places = [self._place(name, spec) for name, spec in setting.guests.items()]

    def _place(self, name: str, spec: host_pb2.GuestSpec) -> Place:
        async def victim_of(guest: host_pb2.Guest) -> Victim:
            return await asyncio.to_thread(self._setting.victim_of, guest, self._relay)

        return Place(
            name=name,
            spec=spec,
            stub=self._stub,
            report=self._report,
            patience=self._setting.patience,
            busy_share=self._setting.busy_share,
            seed=f"{self._seed} {name}",
            victim_of=victim_of,
        )

    async def run(self, until: Until, progress: Callable[[Report], None]) -> None:
        async with self._watching():
            working = asyncio.Event()
            async with asyncio.TaskGroup() as workers:
                for place in self._places:
                    workers.create_task(place.work(working))
                await self._inject(until, progress)
                working.set()
            if self._report.is_well:  # else there is nothing to be shown any more
                await asyncio.gather(*(place.finish() for place in self._places))
            await asyncio.gather(*(place.destroy() for place in self._places))

    async def _inject(self, until: Until, progress: Callable[[Report], None]) -> None:
        for place in self._places:
            await place.victim()
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as lanes:
            for place in self._places:
                lanes.create_task(self._lane(place.name, self._setting.kinds, [place]))
            lanes.create_task(self._lane("host", self._setting.host_kinds, self._places))
            while not self._stop.is_set():
                await asyncio.sleep(_LOOK_S)
                self._report.elapsed_s = time.monotonic() - started_s
                for place in self._places:
                    place.look()
                progress(self._report)
                if until.reached(self._report):
                    self._stop.set()

    async def _lane(self, name: str, kinds: Mapping[Kind, int], places: Sequence[Place]) -> None:
        """One fault after the other on one of these places."""
        for fault in faults(f"{self._seed} {name}", kinds, self._setting.pace):
            await asyncio.sleep(fault.pause_s)
            victim = await self._random.choice(places).victim()
            if self._stop.is_set():
                return
            scene = Scene(
                victim=victim,
                host=self._host,
                stub=self._stub,
                fault=fault,
                refused=self._stranger_refused,
            )
            await self._one(fault, victim, self._setting.injectors[fault.kind](scene))

    def _stranger_refused(self) -> None:
        self._report.strangers_refused += 1

    async def _one(self, fault: Fault, victim: Victim, injector: Injector) -> None:
        try:
            try:
                await self._strike(fault, victim, injector.begin)
                if injector.lasts:
                    await asyncio.sleep(fault.hold_s)
            finally:  # an interrupted run, too, leaves nobody suspended
                await injector.end()
        except Missed:
            self._report.missed += 1
        else:
            self._report.faults[fault.kind] += 1
        await self._back(victim)

    async def _strike(self, fault: Fault, victim: Victim, begin: Callable[[], None]) -> None:
        """Begin at the fault's moment, or when it has been waited for long enough."""
        way = _WAYS.get(fault.moment)
        links = victim.links
        if way is None or not links:
            begin()
            return
        loop = asyncio.get_running_loop()
        struck: asyncio.Future[None] = loop.create_future()

        def strike() -> None:
            try:
                begin()
            except Missed as error:
                struck.set_exception(error)
            else:
                struck.set_result(None)

        def trap() -> None:
            if fault.lag_s:
                loop.call_later(fault.lag_s, strike)
            else:
                strike()

        link = self._random.choice(links)
        link.before_next(way, trap)
        await asyncio.wait([struck], timeout=self._setting.longest_wait_s)
        if link.forget(way, trap):
            strike()
        await struck

    async def _back(self, victim: Victim) -> None:
        since_s = time.monotonic()
        answered = self._setting.back_means_answered
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._setting.back_s):
                while not victim.doomed and not self._stop.is_set():
                    if victim.answered_s > since_s if answered else victim.links:
                        return
                    await asyncio.sleep(_LOOK_S / 20)

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """The guests live as long as their trial is watched."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        request = host_pb2.WatchRequest(trial_id=TRIAL, period_ms=_WATCH_PERIOD_MS)
        while True:
            with contextlib.suppress(grpc.RpcError):
                async for samples in self._stub.Watch(request, wait_for_ready=True):
                    for sample in samples.samples:
                        self._report.books(sample.guest_name, sample.ledger)
            await asyncio.sleep(_LOOK_S / 10)


def plan_of(setting: Setting, seed: int, count: int) -> Iterator[tuple[str, Fault]]:
    """The first faults of each lane: what a run with this seed injects."""
    lanes = dict.fromkeys(setting.guests, setting.kinds) | {"host": setting.host_kinds}
    for name, kinds in lanes.items():
        for fault in itertools.islice(faults(f"{seed} {name}", kinds, setting.pace), count):
            yield name, fault

"""Runs guests at work, injects faults into all of them and their host agent in parallel, and
reports what happened."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from hintfleet.v1 import host_pb2
from tests.support.relay import Address, Direction, Relay
from tests.torture.guest import Victim
from tests.torture.host import HostAgent
from tests.torture.injectors import Injector, Missed, Scene
from tests.torture.place import TRIAL, Deadlines, Place
from tests.torture.plan import Fault, Kind, Moment, Pace, faults
from tests.torture.report import Report

if TYPE_CHECKING:  # HostServiceAsyncStub is in the .pyi file only
    from hintfleet.v1.host_pb2_grpc import HostServiceAsyncStub

_DIRECTIONS = {Moment.GUEST_SPEAKS: Direction.TO_HOST, Moment.HOST_SPEAKS: Direction.TO_GUEST}
_LOOK_S = 0.1
_WATCH_PERIOD_MS = 200


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which guests are tortured, and how.

    :ivar guests: the spec of each place's guests, by the name of the place.
    :ivar kinds: the weight of each kind of fault in a guest.
    :ivar host_kinds: the weight of each kind of fault in their host.
    :ivar injectors: the injector of each kind.
    :ivar advertise: turns the relay's address into one that guests can reach.
    :ivar victim_of: makes the Victim of a new guest.
    :ivar longest_wait_s: the longest wait for a fault's moment.
    :ivar back_s: the longest wait after a fault until the guest is back, so that the next fault
        meets a guest that works.
    :ivar back_means_answered: whether a guest is back only when it has answered a step; else
        when it is connected.
    :ivar busy_share: the largest share of a guest's memory that its workload uses.
    :ivar place: makes a Place.
    :ivar environment: more variables for the host agent.
    :ivar host_arguments: more arguments of the host agent.
    """

    driver: str
    guests: Mapping[str, host_pb2.GuestSpec]
    kinds: Mapping[Kind, int]
    host_kinds: Mapping[Kind, int]
    injectors: Mapping[Kind, Callable[[Scene], Injector]]
    pace: Pace
    deadlines: Deadlines
    advertise: Callable[[Address], str]
    victim_of: Callable[[host_pb2.Guest, Relay], Victim]
    longest_wait_s: float
    back_s: float = 1.0
    back_means_answered: bool = False
    busy_share: float = 0.7
    place: Callable[..., Place] = Place
    environment: Mapping[str, str] = field(default_factory=dict)
    host_arguments: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Until:
    """When to stop injecting: after `seconds`, after `faults` faults, or at the first wrong page,
    so that the cause is near the end of the logs."""

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
    host_module: str = "tests.torture.host_without_rate_limits",
) -> Report:
    """Run the guests of `setting`, inject faults until `until` is reached, and return the report.

    :param progress: called about ten times a second, with the report so far.
    :param host_module: the module to run as the host agent.
    """
    report = Report(driver=setting.driver, seed=seed, guest_count=len(setting.guests))
    relay = Relay()
    with tempfile.TemporaryDirectory(prefix="hf-torture-") as folder:
        Path(folder).chmod(0o711)
        async with relay.serving() as address:
            host = HostAgent(
                Path(folder),
                relay,
                ("--guest-advertise", setting.advertise(address), *setting.host_arguments),
                host_module,
                setting.environment,
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

        return self._setting.place(
            name=name,
            spec=spec,
            stub=self._stub,
            report=self._report,
            deadlines=self._setting.deadlines,
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
            if self._report.is_well:  # after a problem, more checks would show nothing new
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
                    place.read_console()
                progress(self._report)
                if until.reached(self._report):
                    self._stop.set()

    async def _lane(self, name: str, kinds: Mapping[Kind, int], places: Sequence[Place]) -> None:
        """Inject faults of these kinds, one after the other, until the run stops. The victim is the
        guest of one of the places, chosen at random, also for a fault in the host."""
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
                refused=self._impostor_refused,
                problem=self._report.problem,
            )
            await self._inject_one(fault, victim, self._setting.injectors[fault.kind](scene))

    def _impostor_refused(self) -> None:
        self._report.impostors_refused += 1

    async def _inject_one(self, fault: Fault, victim: Victim, injector: Injector) -> None:
        try:
            try:
                await self._begin_at_moment(fault, victim, injector.begin)
                if injector.lasts:
                    await asyncio.sleep(fault.hold_s)
            finally:  # so that an interrupted run leaves no process suspended
                await injector.end()
        except Missed:
            self._report.missed += 1
        else:
            self._report.faults[fault.kind] += 1
        await self._wait_until_back(victim)

    async def _begin_at_moment(
        self, fault: Fault, victim: Victim, begin: Callable[[], None]
    ) -> None:
        """Call `begin` `lag_s` after the fault's moment, or as soon as the longest wait for that
        moment is over. Call it at once if the guest has no connection, or the moment is AT_ONCE.

        :raises Missed: `begin` raised it.
        """
        direction = _DIRECTIONS.get(fault.moment)
        links = victim.links
        if direction is None or not links:
            begin()
            return
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()

        def begin_now() -> None:
            try:
                begin()
            except Missed as error:
                begun.set_exception(error)
            else:
                begun.set_result(None)

        def act() -> None:
            if fault.lag_s:
                loop.call_later(fault.lag_s, begin_now)
            else:
                begin_now()

        link = self._random.choice(links)
        link.before_next(direction, act)
        await asyncio.wait([begun], timeout=self._setting.longest_wait_s)
        if link.cancel_before_next(direction, act):
            begin_now()
        await begun

    async def _wait_until_back(self, victim: Victim) -> None:
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
        """Watch the trial and the host while the block runs, and store the books of the samples in
        the report. Without a Watch, the host agent would end the trial's guests."""
        trial = host_pb2.WatchRequest(trial_id=TRIAL, period_ms=_WATCH_PERIOD_MS)
        host = host_pb2.WatchHostRequest(period_ms=_WATCH_PERIOD_MS)
        tasks = [
            asyncio.create_task(self._watch(lambda: self._stub.Watch(trial, wait_for_ready=True))),
            # Attached guests belong to no trial: only WatchHost sends their samples.
            asyncio.create_task(
                self._watch(lambda: self._stub.WatchHost(host, wait_for_ready=True))
            ),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _watch(self, open_stream: Callable[[], AsyncIterable[host_pb2.SampleSet]]) -> None:
        while True:
            with contextlib.suppress(grpc.RpcError):
                async for samples in open_stream():
                    for sample in samples.samples:
                        self._report.books(self._label(sample.guest_name), sample.ledger)
            await asyncio.sleep(_LOOK_S / 10)

    def _label(self, guest: str) -> str:
        """Return a guest's name in the report. All guests of an attached place have the name of the
        place; its label tells them apart."""
        return next((place.label for place in self._places if place.name == guest), guest)


def plan_of(setting: Setting, seed: int, count: int) -> Iterator[tuple[str, Fault]]:
    """Yield the first `count` faults that each lane of a run with this seed injects, with the name
    of the lane."""
    lanes = dict.fromkeys(setting.guests, setting.kinds) | {"host": setting.host_kinds}
    for name, kinds in lanes.items():
        for fault in itertools.islice(faults(f"{seed} {name}", kinds, setting.pace), count):
            yield name, fault

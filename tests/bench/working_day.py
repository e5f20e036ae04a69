"""Measure what policies cost over a working day that is compressed into minutes (the spec
`workday`), beside the least that a policy that knew the whole day could have paid."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from guest_agent.holding_back import best_cost
from hintfleet.units import GIB, MIB, PAGE_BYTES
from hintfleet.v1 import host_pb2
from orchestrator.spec import file as spec_file
from orchestrator.spec.phases import Kind
from orchestrator.spec.workload import Step, steps_of
from orchestrator.trial.steps import step_request
from tests.bench.real_guests import can_have_real_guests
from tests.bench.report import Figure
from tests.support.agents import HostAgent, running_host_agent
from tests.support.vm import Guests, spec

_CHUNK_BYTES = PAGE_BYTES << 9
_BREAK_EVENS_S = (2, 10, 30)
_COLD_AFTER_S = (1, 5, 30)
_STEP_TIMEOUT_S = 300


class _Use(NamedTuple):
    """How much a guest's workload holds from a time on."""

    at_s: float
    held_bytes: int


@dataclass
class _Day:
    """What happened in one guest.

    :ivar uses: in the order of their times.
    :ivar resident: (time in s, resident bytes) of each sample.
    """

    uses: list[_Use] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    refaulted_bytes: int = 0

    def cost(self, break_even_s: float) -> float:
        """Return the day's cost, in units of one chunk's refault: the refaults, and the holding of
        memory that was resident and free. What was resident before the day is left out."""
        base_bytes = self.resident[0][1]
        held_byte_s = 0.0
        uses = iter([*self.uses, _Use(float("inf"), 0)])
        used_bytes, following = 0, next(uses)
        for (at_s, resident_bytes), (until_s, _) in itertools.pairwise(self.resident):
            while following.at_s <= at_s:
                used_bytes, following = following.held_bytes, next(uses)
            free_bytes = max(0, resident_bytes - base_bytes - used_bytes)
            held_byte_s += free_bytes * (until_s - at_s)
        return self.refaulted_bytes / _CHUNK_BYTES + held_byte_s / _CHUNK_BYTES / break_even_s

    def best(self, break_even_s: float) -> float:
        """Return the least cost for a policy that knew the whole day, in the units of `cost`."""
        left_s: dict[int, float] = {}
        rests: list[float] = []
        used = 0
        for at_s, held_bytes in self.uses:
            levels = -(-held_bytes // _CHUNK_BYTES)
            for level in range(used, levels):
                if level in left_s:
                    rests.append((at_s - left_s.pop(level)) / break_even_s)
            left_s |= dict.fromkeys(range(levels, used), at_s)
            used = levels
        return best_cost(rests)


def run() -> Iterator[Figure]:
    """Let one guest for each policy have the same day at the same time, and yield what each paid /
    the least possible, for three break-even times; of the adaptive guests, only what the one with
    that break-even time paid."""
    spec_of_day = spec_file.load("workday").spec
    steps = steps_of(spec_of_day, spec_of_day.classes[0])
    with running_host_agent() as host:
        host.watch(timeout_s=3600)
        arms = _arms()
        guests = Guests(host, arms)
        guests.wait()
        time.sleep(10)
        with ThreadPoolExecutor(len(arms)) as pool:
            days = dict(
                zip(arms, pool.map(lambda name: _spend(host, name, steps), arms), strict=True)
            )
        _read_samples(host, days)
    for break_even_s in _BREAK_EVENS_S:
        ours = f"adaptive-{break_even_s}s"
        for name in (ours, *(n for n in days if not n.startswith("adaptive"))):
            paid, best = days[name].cost(break_even_s), days[name].best(break_even_s)
            yield Figure(
                name=f"a day's cost, break-even {break_even_s} s, {name} / best in hindsight",
                unit="refaults",
                ours=paid,
                other=best,
                ratio=paid / best,
                wanted="<= 1.3, less than all others" if name == ours else "",
            )


def _arms() -> dict[str, host_pb2.GuestSpec]:
    settings = {
        "eager": host_pb2.HintingSettings(policy="eager"),
        **{
            f"cold-{after_s}s": host_pb2.HintingSettings(
                policy="cold", cold_after_ms=1000 * after_s
            )
            for after_s in _COLD_AFTER_S
        },
        **{
            f"adaptive-{break_even_s}s": host_pb2.HintingSettings(
                policy="adaptive", break_even_ms=1000 * break_even_s
            )
            for break_even_s in _BREAK_EVENS_S
        },
    }
    arms = {
        name: host_pb2.GuestSpec(
            driver=host_pb2.EMBEDDED,
            memory_bytes=512 * MIB,
            method=host_pb2.HINTING,
            hinting=hinting,
        )
        for name, hinting in settings.items()
    }
    if can_have_real_guests():
        arms["reporting"] = spec(host_pb2.REPORTING, memory_bytes=GIB)
    return arms


def _spend(host: HostAgent, name: str, steps: Sequence[Step]) -> _Day:
    """Let a guest do all steps; return the day without its samples."""
    day = _Day(uses=[_Use(time.time(), 0)])
    before_bytes = host.guests()[name].ledger.refaulted_total_bytes
    held_bytes = 0
    for step in steps:
        size_bytes = step.size_bytes(held_bytes, 512 * MIB)
        if step.kind is Kind.FREE:
            day.uses.append(_Use(time.time(), held_bytes - size_bytes))
        request = step_request(step, size_bytes, seed=1)
        request.guest_name = name
        done = host.stub.RunStep(request, timeout=_STEP_TIMEOUT_S)
        if step.kind is Kind.CHURN:
            cycle_s = step.limit_s / done.looped.cycles
            began_s = time.time() - step.limit_s
            for n in range(done.looped.cycles):
                at_s = began_s + n * cycle_s
                day.uses.append(_Use(at_s, held_bytes + size_bytes))
                day.uses.append(_Use(at_s + cycle_s - step.pause_s, held_bytes))
        elif step.kind is Kind.ALLOCATE:
            day.uses.append(_Use(time.time() - done.duration_us / 1e6, done.held_bytes))
        held_bytes = done.held_bytes
        time.sleep(step.hold_s)
    day.uses.append(_Use(time.time(), 0))
    ledger = host.guests()[name].ledger
    day.refaulted_bytes = ledger.refaulted_total_bytes - before_bytes
    return day


def _read_samples(host: HostAgent, days: Mapping[str, _Day]) -> None:
    for samples in host.samples:
        for sample in samples.samples:
            day = days[sample.guest_name]
            at_s = samples.at_unix_us / 1e6
            if day.uses[0].at_s - 0.1 <= at_s <= day.uses[-1].at_s:
                day.resident.append((at_s, sample.ledger.resident_bytes))

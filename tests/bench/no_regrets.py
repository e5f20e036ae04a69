"""Measure what policy adaptive costs a guest that uses its memory again, and how soon it gives back
memory that is not used again: beside none, eager, and on real guests the kernel's own reporting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hintfleet.sketch import Sketch
from hintfleet.units import GIB, MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from tests.bench.real_guests import can_have_real_guests
from tests.bench.report import Figure, side_by_side
from tests.support.agents import HostAgent, running_host_agent
from tests.support.vm import Guests, spec

_ONE_OFF_BYTES = 700 * MIB
_USED_BYTES = 64 * MIB
_LEARNING_MS = 5000
_CHURN_MS = 15_000
_ROUNDS = 2
_TOUCHES_TO_LEARN = 10
_TOUCHES = 15
_TOUCH_PERIOD_S = 0.5
_LONGEST_S = 40.0
_STILL_S = 3.0

_NO_ZEROING = "init_on_alloc=0"


def _embedded(method: host_pb2.Method.ValueType, policy: str = "") -> host_pb2.GuestSpec:
    return host_pb2.GuestSpec(
        driver=host_pb2.EMBEDDED,
        memory_bytes=GIB,
        method=method,
        hinting=host_pb2.HintingSettings(policy=policy),
    )


_EMBEDDED_ARMS = {
    "none": _embedded(host_pb2.NONE),
    "embedded, eager": _embedded(host_pb2.HINTING, "eager"),
    "embedded, adaptive": _embedded(host_pb2.HINTING, "adaptive"),
}
_REAL_ARMS = {
    "none": spec(host_pb2.NONE, parameters=_NO_ZEROING),
    "reporting": spec(host_pb2.REPORTING, parameters=_NO_ZEROING),
    "kmod, eager": spec(isolator="kmod", policy="eager", parameters=_NO_ZEROING),
    "kmod, adaptive": spec(isolator="kmod", policy="adaptive", parameters=_NO_ZEROING),
    "hugetlb, eager": spec(isolator="hugetlb", policy="eager", parameters=_NO_ZEROING),
    "hugetlb, adaptive": spec(isolator="hugetlb", policy="adaptive", parameters=_NO_ZEROING),
}


@dataclass
class _Seen:
    """What was measured in one guest: one of `cycles` and of `p99_us` for each round, one of
    `touch_s` for each touch that counts. The other figures are of the guest as a whole."""

    back_s: float = 0.0
    back_mib: float = 0.0
    cycles: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    touch_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    """Of the guest's agent and the host agent, during churn."""
    refaulted_mib: float = 0.0


def run() -> Iterator[Figure]:
    """Yield the figures of embedded guests, then those of real guests. If libvirt-python or the
    guest image is missing, leave out the real guests, and say so on stderr."""
    yield from _compared(_measured(_EMBEDDED_ARMS))
    if can_have_real_guests():
        yield from _compared(_measured(_REAL_ARMS))


def _measured(arms: Mapping[str, host_pb2.GuestSpec]) -> dict[str, _Seen]:
    """Measure one guest for each arm, in turns, so that other work on the machine affects all of
    them."""
    with running_host_agent() as host:
        host.watch(timeout_s=3600)
        guests = Guests(host, {_name(arm): made for arm, made in arms.items()})
        guests.wait()
        seen = {arm: _Seen() for arm in arms}
        time.sleep(_STILL_S)
        for arm in list(arms)[1:]:
            _give_back(host, _name(arm), seen[arm])
        for _ in range(_ROUNDS):
            for arm, one in seen.items():
                _churn(host, _name(arm), _LEARNING_MS)
                with _Cost(host, _name(arm), one):
                    cycles, p99_us = _churn(host, _name(arm), _CHURN_MS)
                one.cycles.append(cycles)
                one.p99_us.append(p99_us)
        for _ in range(_ROUNDS):
            for arm, one in seen.items():
                touches_s = [
                    _touch_s(host, _name(arm)) for _ in range(_TOUCHES_TO_LEARN + _TOUCHES)
                ]
                one.touch_s += touches_s[_TOUCHES_TO_LEARN:]
        for arm, one in seen.items():
            ledger = host.guests()[_name(arm)].ledger
            one.refaulted_mib = ledger.refaulted_total_bytes / MIB
    return seen


def _compared(seen: Mapping[str, _Seen]) -> Iterator[Figure]:
    none = seen["none"]
    for arm, one in seen.items():
        ours = arm.endswith("adaptive")
        for peer in ("none", "reporting"):
            if peer in seen and arm not in ("none", peer):
                wanted = {"none": ">= 0.97", "reporting": ">= 1"}[peer] if ours else ""
                pairs = list(zip(one.cycles, seen[peer].cycles, strict=True))
                yield side_by_side(f"churn, {arm} / {peer}", "cycles", pairs, wanted)
        if arm == "none":
            continue
        yield side_by_side(
            f"churn, 99 % of allocations of 2 MiB, {arm} / none",
            "us",
            list(zip(one.p99_us, none.p99_us, strict=True)),
            "<= 1.1" if ours else "",
        )
        touch = list(zip(one.touch_s, none.touch_s, strict=True))
        yield side_by_side(f"touch loop, {arm} / none", "s", touch, "<= 1.03" if ours else "")
        yield Figure(
            name=f"memory taken back by its guest, {arm}", unit="MiB", ours=one.refaulted_mib
        )
        if ours:
            eager = seen[arm.replace("adaptive", "eager")]
            # The agent of an embedded guest is one process with its workload.
            if not arm.startswith("embedded"):
                cpu = [(one.cpu_s, eager.cpu_s)]
                yield side_by_side(f"CPU of both agents, {arm} / eager", "s", cpu, "<= 1")
            back = [(one.back_mib, eager.back_mib)]
            yield side_by_side(f"one-off memory back, {arm} / eager", "MiB", back, ">= 1")
        yield Figure(
            name=f"95 % of {_ONE_OFF_BYTES // MIB} MiB that was used once is back, {arm}",
            unit="s",
            ours=one.back_s,
            other=seen["reporting"].back_s if "reporting" in seen else None,
            ratio=one.back_s / seen["reporting"].back_s if "reporting" in seen else None,
            wanted=("<= 1.3 s" + (", ratio <= 0.1" if arm.startswith("kmod") else ""))
            if ours
            else "",
        )


def _name(arm: str) -> str:
    return arm.replace(", ", "-")


def _give_back(host: HostAgent, name: str, seen: _Seen) -> None:
    """Use memory once and free it; note in `seen` how much comes back to the host, and how soon
    95 % of that is back."""
    host.allocate(_ONE_OFF_BYTES, name)
    full_bytes = host.guests()[name].ledger.resident_bytes
    host.free(_ONE_OFF_BYTES, name)
    freed_s = still_s = time.monotonic()
    found = [(0.0, full_bytes)]
    while time.monotonic() - still_s < _STILL_S and time.monotonic() - freed_s < _LONGEST_S:
        resident_bytes = host.guests()[name].ledger.resident_bytes
        if resident_bytes < found[-1][1] - MIB or len(found) == 1:
            still_s = time.monotonic()
            found.append((still_s - freed_s, resident_bytes))
        time.sleep(0.005)
    back_bytes = full_bytes - found[-1][1]
    seen.back_mib = back_bytes / MIB
    seen.back_s = next(at for at, left in found if full_bytes - left >= 0.95 * back_bytes)


def _churn(host: HostAgent, name: str, duration_ms: int) -> tuple[float, float]:
    """Allocate, write and free as fast as it goes; return cycles per second, and the time in us
    that 99 % of the allocations needed at most."""
    pattern = hinting_pb2.Loop.CHURN
    settings = {"size_bytes": _USED_BYTES, "duration_ms": duration_ms, "seed": 1}
    done = host.loop(pattern, name, **settings)
    looped = done.looped
    sketch = Sketch(
        first_bucket=looped.allocation_us.first_bucket, counts=tuple(looped.allocation_us.counts)
    )
    return 1000 * looped.cycles / duration_ms, sketch.quantile(0.99) or 0.0


def _touch_s(host: HostAgent, name: str) -> float:
    """Allocate memory, write to it and free it, and wait until half a second has passed since the
    beginning; return how long the guest took to allocate and write, in s."""
    began_s = time.monotonic()
    done = host.allocate(_USED_BYTES, name)
    host.free(_USED_BYTES, name)
    time.sleep(max(0.0, began_s + _TOUCH_PERIOD_S - time.monotonic()))
    return done.duration_us / 1e6


class _Cost:
    """Adds to a `_Seen` the CPU time of the host agent and the guest's agent during a block."""

    def __init__(self, host: HostAgent, name: str, seen: _Seen) -> None:
        self._host, self._name, self._seen = host, name, seen

    def __enter__(self) -> None:
        self._before_s = self._cpu_s()

    def __exit__(self, *_: object) -> None:
        self._seen.cpu_s += self._cpu_s() - self._before_s

    def _cpu_s(self) -> float:
        tasks = Path(f"/proc/{self._host.process.pid}/task").iterdir()
        host_s = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        return host_s + self._agent_s()

    def _agent_s(self) -> float:
        for samples in reversed(self._host.samples):
            for sample in samples.samples:
                if sample.guest_name == self._name:
                    return sample.agent_cpu_us / 1e6
        return 0.0

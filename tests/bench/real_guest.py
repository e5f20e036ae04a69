"""Measure how much memory comes back from a real guest, and how fast: by eager hinting, by hinting
on request (settle), and by the peers; how much each method slows the guest down; and the RSS of the
agent of guests that hint."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Event, Thread

from hintfleet.units import GIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.api import errors_as, modules
from host_agent.guests.libvirt.domain_xml import NAME_PREFIX
from host_agent.memory.ram import GuestRam
from tests.bench.real_guests import can_have_real_guests
from tests.bench.report import Figure, side_by_side
from tests.support.agents import HostAgent, running_host_agent
from tests.support.vm import Guests, qemu_ram, spec

_ROUNDS = 3
_DIRTIED_BYTES = 700 * MIB
_TOUCHED_BYTES = 64 * MIB
_TOUCH_ROUNDS = 12
_SAMPLE_S = 0.01
_STILL_S = 5.0
_STILL_WHEN_SETTLED_S = 0.5
_LONGEST_S = 40.0
_NOISE_BYTES = 2 * MIB

_NO_ZEROING = "init_on_alloc=0"
# The fastest balloon: one step to the size that its rule asks for.
_ONE_STEP = host_pb2.BalloonSettings(step_percent=100)
_ARMS: Mapping[str, host_pb2.GuestSpec] = {
    "none": spec(host_pb2.NONE, parameters=_NO_ZEROING),
    "kmod": spec(policy="eager", parameters=_NO_ZEROING),
    "hugetlb": spec(isolator="hugetlb", policy="eager", parameters=_NO_ZEROING),
    "reporting": spec(host_pb2.REPORTING, parameters=_NO_ZEROING),
    "balloon": spec(host_pb2.BALLOON, parameters=_NO_ZEROING, balloon=_ONE_STEP),
}


@dataclass(frozen=True, kw_only=True)
class _Return:
    """How memory came back in one round.

    :ivar back_bytes: the most resident bytes of the RAM file minus the fewest.
    :ivar took_s: from the workload's last free until 95 % of `back_bytes` had left; at least
        _SAMPLE_S.
    :ivar moving_s: from the moment when 1 % of `back_bytes` had left until 95 % had left.
    """

    back_bytes: int
    took_s: float
    moving_s: float

    @property
    def gib_per_s(self) -> float:
        return 0.94 * self.back_bytes / GIB / max(self.moving_s, _SAMPLE_S)


def run() -> Iterator[Figure]:
    """Compare the methods in real guests, one after the other, so that none disturbs another. Yield
    nothing if libvirt-python or the guest image is missing."""
    if not can_have_real_guests():
        return
    with running_host_agent() as host:
        host.watch(timeout_s=1800)
        seen = {arm: _measure(host, arm, wanted) for arm, wanted in _ARMS.items()}
        fast = {arm: _measure_asked(host, arm) for arm in ("kmod", "hugetlb")}
    yield from _against_reporting(seen)
    for arm, returns in fast.items():
        pairs = list(zip(returns, seen["balloon"].returns, strict=True))
        yield side_by_side(
            f"memory back when asked, {arm} / balloon in one step",
            "GiB/s",
            [(ours.gib_per_s, other.gib_per_s) for ours, other in pairs],
            ">= 4",
        )
    for arm in list(seen)[1:]:
        yield _slowdown(arm, seen[arm].touch_s, seen["none"].touch_s)
    for arm in ("kmod", "hugetlb"):
        name = f"guest agent's RSS in a real guest, {arm}"
        yield Figure(name=name, unit="MiB", ours=seen[arm].agent_rss_mib)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The measurements of one arm's guest."""

    returns: list[_Return]
    touch_s: list[float]
    agent_rss_mib: float


def _measure(host: HostAgent, arm: str, wanted: host_pb2.GuestSpec) -> _Seen:
    with _Bench(host, arm, wanted) as guest:
        touch_s = [guest.touch_s() for _ in range(_TOUCH_ROUNDS)]
        hints = wanted.method != host_pb2.NONE
        return _Seen(
            touch_s=touch_s,
            returns=[guest.give_back(_DIRTIED_BYTES) for _ in range(_ROUNDS)] if hints else [],
            agent_rss_mib=guest.agent_rss_mib(),
        )


def _measure_asked(host: HostAgent, isolator: str) -> list[_Return]:
    """Measure how fast memory comes back when all of it is freed first, and the agent is then asked
    to settle. Before that it hints nothing: hugetlb is polled only every 60 s, and the kernel's
    page reporting, which gives kmod its chunks, waits for 2 s after a free.

    So little is freed that it comes back in less than the 2 s between two passes of page reporting.
    """
    wanted = spec(isolator=isolator, parameters=_NO_ZEROING)
    wanted.hinting.report_period_ms = 60_000
    with _Bench(host, isolator, wanted) as guest:
        host.settle(isolator)
        return [
            guest.give_back(_DIRTIED_BYTES // 2, lambda: host.settle(isolator))
            for _ in range(_ROUNDS)
        ]


def _against_reporting(seen: Mapping[str, _Seen]) -> Iterator[Figure]:
    for arm, wanted in (("kmod", "<= 0.1"), ("hugetlb", "<= 0.25"), ("balloon", "")):
        pairs = list(zip(seen[arm].returns, seen["reporting"].returns, strict=True))
        yield side_by_side(
            f"until 95 % of {_DIRTIED_BYTES // MIB} MiB is back, {arm} / reporting",
            "s",
            [(ours.took_s, other.took_s) for ours, other in pairs],
            wanted,
        )
        yield side_by_side(
            f"memory back, {arm} / reporting",
            "MiB",
            [(ours.back_bytes / MIB, other.back_bytes / MIB) for ours, other in pairs],
            ">= 1" if wanted else "",
        )


def _slowdown(arm: str, seconds: list[float], none: list[float]) -> Figure:
    """Return a figure of the times of touch_s(): under an arm / under `none`, as medians. The
    quartiles of the ratio are in the figure's name."""
    usual_s = statistics.median(none)
    low, median, high = (s / usual_s for s in statistics.quantiles(seconds))
    return Figure(
        name=f"page touch loop, {arm} / none (quartiles {low:.2f}, {high:.2f})",
        unit="s",
        ours=median * usual_s,
        other=usual_s,
        ratio=median,
        rounds=len(seconds),
    )


class _Bench:
    """One guest, which is destroyed at the end of the block. While it gives memory back, the
    resident bytes of its RAM file are sampled every 10 ms: one system call for each sample."""

    def __init__(self, host: HostAgent, name: str, wanted: host_pb2.GuestSpec) -> None:
        self._host = host
        self._name = name
        made = Guests(host, {name: wanted})
        made.wait()
        made[name]
        self._ram = _open_ram(name)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._ram.close()
        request = host_pb2.DestroyGuestRequest(name=self._name)
        self._host.stub.DestroyGuest(request, timeout=30)

    def touch_s(self) -> float:
        """Allocate memory, write to it and free it; wait for half a second, so that it can be
        hinted before the next call. Return how long the guest took to allocate and write, in s."""
        done = self._host.allocate(_TOUCHED_BYTES, self._name)
        self._host.free(_TOUCHED_BYTES, self._name)
        time.sleep(0.5)
        return done.duration_us / 1e6

    def give_back(self, size_bytes: int, ask: Callable[[], object] | None = None) -> _Return:
        """Allocate memory, write to it and free all of it; return how much left the RAM file, and
        how fast.

        :param ask: called right after the memory is free, to make the guest hint.
        """
        self._host.allocate(size_bytes, self._name)
        time.sleep(0.5)
        with _Sampled(self._ram) as sampled:
            self._host.free(size_bytes, self._name)
            freed_at_s = time.monotonic()
            if ask is not None:
                ask()
            sampled.wait_until_still(_STILL_WHEN_SETTLED_S if ask else _STILL_S)
        return _judge(sampled.seen, freed_at_s)

    def agent_rss_mib(self) -> float:
        """Return the agent's RSS from the last sample of the guest; 0 if there is no sample."""
        for samples in reversed(self._host.samples):
            for sample in samples.samples:
                if sample.guest_name == self._name:
                    return sample.agent_rss_bytes / MIB
        return 0.0


class _Sampled:
    """Records the resident bytes of a RAM, with their times, during a `with` block."""

    def __init__(self, ram: GuestRam) -> None:
        self.seen = [(time.monotonic(), ram.resident_bytes())]
        self._ram = ram
        self._stop = Event()
        self._thread = Thread(target=self._sample)

    def __enter__(self) -> _Sampled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.seen.append((time.monotonic(), self._ram.resident_bytes()))

    def wait_until_still(self, still_s: float) -> None:
        """Wait until no more than _NOISE_BYTES have left the RAM within `still_s`, but at most
        _LONGEST_S."""
        began_s = moved_s = time.monotonic()
        lowest_bytes = self.seen[-1][1]
        while time.monotonic() - moved_s < still_s and time.monotonic() - began_s < _LONGEST_S:
            time.sleep(_SAMPLE_S)
            if (now_bytes := self.seen[-1][1]) < lowest_bytes - _NOISE_BYTES:
                lowest_bytes, moved_s = now_bytes, time.monotonic()


def _judge(seen: list[tuple[float, int]], freed_at_s: float) -> _Return:
    """Return the figures of one round. Hinting may begin while the workload is still freeing:
    `took_s` counts only the time after the last free, but at least the time of one sample."""
    full_bytes = max(resident for _, resident in seen)
    back_bytes = full_bytes - min(resident for _, resident in seen)

    def left_at_s(share: float) -> float:
        return next(at for at, resident in seen if full_bytes - resident >= share * back_bytes)

    return _Return(
        back_bytes=back_bytes,
        took_s=max(left_at_s(0.95) - freed_at_s, _SAMPLE_S),
        moving_s=left_at_s(0.95) - left_at_s(0.01),
    )


def _open_ram(name: str) -> GuestRam:
    libvirt, _ = modules()
    with errors_as(f"looking for guest {name}"):
        connection = libvirt.open(os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system"))
        try:
            return qemu_ram(connection.lookupByName(NAME_PREFIX + name))
        finally:
            connection.close()

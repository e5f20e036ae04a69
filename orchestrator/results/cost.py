"""Computes what a method cost one host in one trial, from its samples and steps. Pure.

CPU time, wire bytes and ranges are counted over the measured window (see `footprint`): from the
last sample at or before the window's start to the last sample at or before its end. The size of the
tracker is the maximum over all samples. The other figures are times of steps and Settle calls, and
what loops did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from orchestrator.results.footprint import Numbers, Series, Window, last_index, window_of
from orchestrator.results.loops import LoopSum, loops_of
from orchestrator.trial.records import BLOCK, CUT, GuestSettled, StepDone

SETTLED_SHARE = 0.95
# If less than this share of the freed bytes came back, the step has no settle time: so small a
# change may be other memory of the guest.
_MIN_CAME_BACK_SHARE = 0.05
_US_PER_S = 1_000_000

COUNTERS = (
    "agent_cpu_us",
    "process_cpu_us",
    "host_agent_cpu_us",
    "observing_cpu_us",
    "wire_bytes",
    "ranges",
    "tracker_bytes",
)
"""The columns that a series must have for `host_cost`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a host and its guests spent in a trial.

    :ivar settle_s: one value for each guest and free step after which memory came back to the host
        (at least 5 % of what was freed): time from the end of the step until 95 % of that memory
        was back; 0 if it was back before the end.
    :ivar asked_settle_s: how long each Settle call took.
    :ivar step_s: total time of all steps of all guests, without the read-back, without loops
        and blocks, whose time is given, and without the time that replays waited. 0 if there are
        no others.
    :ivar agent_cpu_s: CPU time of the guests' agents. For an embedded guest this is the whole
        guest process, but 0 under method none.
    :ivar process_cpu_s: CPU time of the guests' processes on the host (embedded process,
        QEMU).
    :ivar host_agent_cpu_s: CPU time of the host agent, which serves all guests, without
        `observing_cpu_s`.
    :ivar observing_cpu_s: CPU time of the host agent for samples, and for audits that serve
        only samples: the price of measuring, not of the method.
    :ivar tracker_bytes: the maximum over all guests and samples.
    :ivar loops: one sum for each title of loops in the workload.
    """

    settle_s: tuple[float, ...]
    asked_settle_s: tuple[float, ...]
    step_s: float
    agent_cpu_s: float
    process_cpu_s: float
    host_agent_cpu_s: float
    wire_bytes: int
    ranges: int
    tracker_bytes: int
    observing_cpu_s: float = 0.0
    loops: tuple[LoopSum, ...] = ()

    @property
    def host_cpu_s(self) -> float:
        """CPU time of the guests' processes and the host agent, without `observing_cpu_s`."""
        return self.process_cpu_s + self.host_agent_cpu_s


def host_cost(
    series: Mapping[str, Series],
    steps: Mapping[str, Sequence[StepDone]],
    settled: Sequence[GuestSettled],
) -> Cost:
    """Compute the cost of one host in one trial.

    :param series: the samples of each guest, with COUNTERS.
    :param steps: the steps of each guest, in order; the last one is the read-back, or the end of a
        switchback's block.
    :raises Undecided: a workload, or a block of a switchback, did not finish.
    """
    windows = {guest: window_of(guest, steps[guest]) for guest in series}

    def spent(
        counter: str, increase: Callable[[Numbers], float] = _last_minus_first
    ) -> list[float]:
        return [increase(_within(part, counter, windows[guest])) for guest, part in series.items()]

    # The CPU time of the host agent is one counter, repeated in the series of every guest, so its
    # increases are not summed. The windows of the guests differ: the largest increase is taken.
    observing_s = max(spent("observing_cpu_us")) / _US_PER_S
    return Cost(
        settle_s=tuple(s for guest, part in series.items() for s in _settle_s(part, steps[guest])),
        asked_settle_s=tuple(done.duration_us / _US_PER_S for done in settled),
        step_s=sum(_work_us(step) for done in steps.values() for step in done[:-1]) / _US_PER_S,
        agent_cpu_s=sum(spent("agent_cpu_us", _sum_of_steps)) / _US_PER_S,
        process_cpu_s=sum(spent("process_cpu_us")) / _US_PER_S,
        host_agent_cpu_s=max(spent("host_agent_cpu_us")) / _US_PER_S - observing_s,
        observing_cpu_s=observing_s,
        wire_bytes=int(sum(spent("wire_bytes"))),
        ranges=int(sum(spent("ranges"))),
        tracker_bytes=max(int(part.counters["tracker_bytes"].max()) for part in series.values()),
        loops=loops_of(steps),
    )


def _work_us(step: StepDone) -> int:
    """Return how long the guest worked on a step; 0 for one whose time is given."""
    is_given = step.loop or step.kind in (CUT, BLOCK)
    return 0 if is_given else step.duration_us - step.waited_us


def _within(series: Series, counter: str, window: Window) -> Numbers:
    """Return a counter's values from the last one at or before the window's start to its end."""
    start, end = (last_index(series, at_us) for at_us in (window.start_us, window.end_us))
    return series.counters[counter][start : end + 1]


def _last_minus_first(values: Numbers) -> float:
    return int(values[-1]) - int(values[0])


def _sum_of_steps(values: Numbers) -> float:
    """Return the increase of a counter that may have begun again at 0."""
    # An agent counts its own CPU time. Its guest's systemd may restart it at any time, and a block
    # of a switchback counts all the same (trial/block_runner.py).
    numbers = values.astype(np.int64)
    steps = np.diff(numbers)
    return float(np.where(steps < 0, numbers[1:], steps).sum(dtype=float))


def _settle_s(series: Series, steps: Sequence[StepDone]) -> Iterator[float]:
    """Yield the settle times of one guest in seconds.

    There is one for each free step after which at least 5 % of the freed bytes came back to the
    host before the next step. See `Cost.settle_s`.
    """
    for step, following in pairwise(steps):
        if step.kind != "free":
            continue
        before = _at(series, last_index(series, step.started_unix_us))
        first = last_index(series, step.at_unix_us) + 1
        after = slice(first, last_index(series, following.started_unix_us) + 1)
        resident = series.resident_bytes[after].astype(float)
        came_back = before - resident.min(initial=before)
        if came_back < _MIN_CAME_BACK_SHARE * max(step.changed_bytes, 1):
            continue
        enough = before - SETTLED_SHARE * came_back
        # The agent hints while the step is still freeing memory, so 95 % may be back before the
        # step ends.
        if _at(series, first - 1) <= enough:
            yield 0.0
        else:
            settled_us = series.at_unix_us[after][np.argmax(resident <= enough)]
            yield (int(settled_us) - step.at_unix_us) / _US_PER_S


def _at(series: Series, index: int) -> float:
    value: Any = series.resident_bytes[index]
    return float(value)

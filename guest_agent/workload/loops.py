"""Loops: for a time, the workload works in memory that it takes only for that, as fast as it can.

`churn` allocates, writes and frees, and may pause; each block is verified before it is freed.
`fault` does as page_fault1 of will-it-scale: take memory, write one byte to each page, free it.
`bandwidth` copies memory, as STREAM's Copy does, and verifies the copies at the end. One thread
does all of this, an extent at a time; the slow part of each step is one call into C.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import cycle

from guest_agent.workload.holding import Holding
from guest_agent.workload.source import EXTENT_BYTES, Source
from hintfleet.errors import InvalidInput
from hintfleet.sketch import Sketch, bucket_of
from hintfleet.v1 import hinting_pb2 as pb

_RATE_PERIOD_S = 0.1


class _Meter:
    """Measures a loop, and says when it is over."""

    def __init__(self, loop: pb.Loop, stop: threading.Event) -> None:
        self.cycles = 0
        self._touched_bytes = 0
        self._allocation_us: Counter[int] = Counter()
        self._bytes_per_s: Counter[int] = Counter()
        self._stop = stop
        self._rate_began_s = time.monotonic()
        self._rate_bytes = 0
        self._end_s = self._rate_began_s + loop.duration_ms / 1000

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end_s and not self._stop.is_set()

    def allocated(self, began_s: float) -> None:
        """Record the time since `began_s`, in which one extent was allocated and written to."""
        self._allocation_us[bucket_of((time.monotonic() - began_s) * 1e6)] += 1

    def touched(self, size_bytes: int) -> None:
        """Count memory that was touched, for the total and for the rate."""
        self._touched_bytes += size_bytes
        self._rate_bytes += size_bytes
        now_s = time.monotonic()
        passed_s = now_s - self._rate_began_s
        if passed_s >= _RATE_PERIOD_S:
            self._bytes_per_s[bucket_of(self._rate_bytes / passed_s)] += 1
            self._rate_began_s, self._rate_bytes = now_s, 0

    def pause(self, pause_s: float) -> None:
        """Wait for `pause_s`, but no longer than until the loop ends."""
        self._stop.wait(min(pause_s, max(0.0, self._end_s - time.monotonic())))

    def result(self) -> pb.Looped:
        return pb.Looped(
            cycles=self.cycles,
            touched_bytes=self._touched_bytes,
            allocation_us=_sketch(self._allocation_us),
            bytes_per_s=_sketch(self._bytes_per_s),
        )


def run_loop(loop: pb.Loop, holding: Holding, source: Source, stop: threading.Event) -> pb.Looped:
    """Run a loop until its time is over, and return what it did.

    Afterwards the memory of the loop is free, also after an error.

    :param stop: ends the loop early when it is set.
    :raises MemoryError: there is not enough memory.
    :raises InvalidInput: this agent does not know the pattern, or the loop has too little memory.
    """
    extents = -(-loop.size_bytes // EXTENT_BYTES)
    if not extents:
        raise InvalidInput("a loop needs memory to work in: its size is 0")
    if loop.pattern == pb.Loop.CHURN:
        return _churn(loop, holding, extents, stop)
    if loop.pattern == pb.Loop.FAULT:
        return _fault(loop, source, extents, stop)
    if loop.pattern == pb.Loop.BANDWIDTH:
        return _bandwidth(loop, holding, extents, stop)
    raise InvalidInput("this agent does not know the loop: it is older than its host's")


def _churn(loop: pb.Loop, holding: Holding, extents: int, stop: threading.Event) -> pb.Looped:
    held: list[int] = []
    meter = _Meter(loop, stop)
    while meter.goes_on:
        try:
            while len(held) < extents and meter.goes_on:
                began_s = time.monotonic()
                held.append(holding.take(EXTENT_BYTES, loop.seed))
                meter.allocated(began_s)
                meter.touched(EXTENT_BYTES)
            meter.cycles += len(held) == extents
        finally:
            while held:
                holding.free(held.pop())
        meter.pause(loop.pause_ms / 1000)
    return meter.result()


def _fault(loop: pb.Loop, source: Source, extents: int, stop: threading.Event) -> pb.Looped:
    mapped: list[int] = []
    meter = _Meter(loop, stop)
    while meter.goes_on:
        try:
            while len(mapped) < extents and meter.goes_on:
                began_s = time.monotonic()
                mapped.append(source.allocate(EXTENT_BYTES))
                source.touch(mapped[-1])
                meter.allocated(began_s)
                meter.touched(EXTENT_BYTES)
            meter.cycles += len(mapped) == extents
        finally:
            while mapped:
                source.free(mapped.pop(), EXTENT_BYTES)
    return meter.result()


def _bandwidth(loop: pb.Loop, holding: Holding, extents: int, stop: threading.Event) -> pb.Looped:
    half = extents // 2
    if not half:
        raise InvalidInput("bandwidth copies from one 2 MiB to another: it needs at least 4 MiB")
    held: list[int] = []
    try:
        while len(held) < extents:
            held.append(holding.take(EXTENT_BYTES, loop.seed))
        meter = _Meter(loop, stop)
        for i in cycle(range(half)):
            if not meter.goes_on:
                break
            holding.copy(held[i], held[half + i])
            meter.touched(2 * EXTENT_BYTES)
            meter.cycles += i == half - 1
        return meter.result()
    finally:
        for at in held:
            holding.free(at)


def _sketch(counts: Counter[int]) -> pb.Sketch:
    sketch = Sketch.of(counts)
    return pb.Sketch(first_bucket=sketch.first_bucket, counts=sketch.counts)

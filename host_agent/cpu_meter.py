"""Measures the processor time that this process spends on one purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class CpuMeter:
    """Processor time spent on one purpose.

    :ivar cpu_ns: the sum so far, in nanoseconds.
    """

    def __init__(self) -> None:
        self.cpu_ns = 0

    def add(self, cpu_s: float) -> None:
        """Add the processor time that another thread has spent."""
        self.cpu_ns += round(cpu_s * 1e9)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block. It must not await: other tasks would run and be counted."""
        # thread_time: the process's clock would count gRPC's threads and the workers, too.
        started_ns = time.thread_time_ns()
        try:
            yield
        finally:
            self.cpu_ns += time.thread_time_ns() - started_ns

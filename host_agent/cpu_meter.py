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
        """Add processor time, in seconds, that the caller has measured itself."""
        self.cpu_ns += round(cpu_s * 1e9)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the processor time of the block. The block must not await: other tasks would run
        then, and their time would be counted, too."""
        # The clock of this thread: the process's clock would also count gRPC's and worker threads.
        started_ns = time.thread_time_ns()
        try:
            yield
        finally:
            self.cpu_ns += time.thread_time_ns() - started_ns

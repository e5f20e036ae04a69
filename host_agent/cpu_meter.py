"""What one purpose costs this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class CpuMeter:
    """Processor time that was spent on one purpose.

    :ivar cpu_ns: all of it so far.
    """

    def __init__(self) -> None:
        self.cpu_ns = 0

    def add(self, cpu_s: float) -> None:
        """Enter what another thread has spent on it."""
        self.cpu_ns += round(cpu_s * 1e9)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The block serves that purpose. It must not wait for anything: other tasks would run."""
        started_ns = time.thread_time_ns()
        try:
            yield
        finally:
            self.cpu_ns += time.thread_time_ns() - started_ns

"""Finds in a host's samples whether the guests needed more memory than its budget. No I/O."""

from __future__ import annotations

import asyncio

from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.trial.records import HostRanOut

# The kernel counts the pages of a cgroup in batches for each processor, so the usage that it
# reports may be wrong by so much.
_SLACK_BYTES = 1 << 20


class BudgetWatch:
    """What the samples of one host's part of a trial say about its memory budget.

    :ivar ran_out: set when the guests have needed more than the budget. It stays set.
    :ivar used_bytes: how much of the budget was used in the last sample.
    :ivar is_over: whether that was more than 1 MiB above the budget. With a cgroup, the kernel is
        about to swap out what is too much, or the host will run out.
    """

    def __init__(self) -> None:
        self.ran_out = asyncio.Event()
        self.used_bytes = 0
        self.is_over = False
        self._oom_before: int | None = None
        self._seen = host_pb2.SampleSet()
        """The samples that show that the host ran out."""

    def take(self, samples: host_pb2.SampleSet) -> None:
        """Take the next samples of the host."""
        use = samples.budget_use
        self.used_bytes = use.used_bytes
        self.is_over = use.used_bytes > use.limit_bytes + _SLACK_BYTES
        if self._oom_before is None:
            self._oom_before = use.oom_count  # those of earlier trials on this host agent
        over = not use.enforced and use.used_bytes > use.limit_bytes
        if (over or use.oom_count > self._oom_before) and not self.ran_out.is_set():
            self._seen = samples
            self.ran_out.set()

    def event(self, host: str, trial_id: str) -> HostRanOut:
        """Return the record that the host ran out of memory."""
        use = self._seen.budget_use
        return HostRanOut(
            host=host,
            trial_id=trial_id,
            at_unix_us=self._seen.at_unix_us,
            used_bytes=use.used_bytes,
            limit_bytes=use.limit_bytes,
            enforced=use.enforced,
        )


def describe(event: HostRanOut) -> str:
    """Return in one line that a host ran out of memory, and how that was seen."""
    seen = (
        "the kernel had no more for their cgroup"
        if event.enforced
        else f"they used {format_size(event.used_bytes)}"
    )
    limit = format_size(event.limit_bytes)
    return f"{event.host}: ran out of memory: its guests needed more than its {limit}: {seen}"

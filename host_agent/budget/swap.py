"""Swap for the guests of a host, whose memory counts into the host's budget."""

from __future__ import annotations

import threading

from hintfleet.errors import Refused
from host_agent.budget.memory_cgroup import MemoryCgroup
from host_agent.budget.zram import Zram

# How often the limit follows what the device takes; how long the budget may be exceeded meanwhile,
# for guests that are writing.
_PERIOD_S = 0.05
_PERIODS_OVER = 20
_ROUNDS = 8
# The kernel counts pages of a cgroup in batches for each processor.
_SLACK_BYTES = 1 << 20


class Swap:
    """A zram device, to which the kernel moves what a cgroup uses beyond its limit. The limit is
    lowered by the memory that the device takes, which the kernel counts for no cgroup.

    :ivar overflows: how often too little could be swapped out, for a second or more, to keep both
        within the budget.
    """

    def __init__(self, size_bytes: int, cgroup: MemoryCgroup, budget_bytes: int) -> None:
        """Make the device, and begin to lower the limit.

        :raises Refused: there can be no such device, or the cgroup cannot swap.
        """
        self.size_bytes = size_bytes
        self.overflows = 0
        self._cgroup = cgroup
        self._budget_bytes = budget_bytes
        self._zram = Zram.make(size_bytes)
        try:
            cgroup.allow_swap(size_bytes, budget_bytes)
        except Refused:
            self._zram.remove()
            raise
        self._end = threading.Event()
        # A thread: to lower the limit takes as long as the kernel swaps out.
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """The memory that the device takes."""
        return self._zram.used_bytes

    def close(self) -> None:
        """End the device, and swap in the cgroup. May be called twice."""
        self._end.set()
        self._thread.join()
        self._zram.remove()
        self._cgroup.allow_swap(0, self._budget_bytes)

    def _keep(self) -> None:
        over = 0
        while not self._end.wait(_PERIOD_S):
            over = 0 if self._fits() else over + 1
            if over == _PERIODS_OVER:
                self.overflows += 1

    def _fits(self) -> bool:
        """Swap out until memory and device are within the budget; return whether they are."""
        for _ in range(_ROUNDS):
            left_bytes = self._budget_bytes - self._zram.used_bytes
            if not self._cgroup.set_limit(left_bytes):
                return False
            # What was swapped out since takes memory of the device, too, but less and less.
            used_bytes = self._cgroup.used_bytes + self._zram.used_bytes
            if used_bytes <= self._budget_bytes + _SLACK_BYTES:
                return True
        return False

"""Swap for the guests of a host. The memory that the swap device takes counts into the host's
budget."""

from __future__ import annotations

import threading

from host_agent.budget.memory_cgroup import MemoryCgroup
from host_agent.budget.zram import Zram

# The time between two adaptations of the limit to what the device takes, and how many failures in a
# row, or more, count as one overflow.
_PERIOD_S = 0.05
_PERIODS_OVER = 20
_ROUNDS = 8


class Swap:
    """The swap of a cgroup: none, or a zram device, to which the kernel moves what the cgroup uses
    beyond its limit. The limit is lowered by the memory that the device takes, which the kernel
    counts for no cgroup.

    :ivar size_bytes: of the device; 0 if there is none.
    :ivar overflows: how often, for a second or more, too little could be swapped out to keep the
        cgroup and the device together within the budget. It never falls. In cgroup v2, the kernel
        kills a process instead (`MemoryCgroup.oom_count`).
    """

    def __init__(self, cgroup: MemoryCgroup, budget_bytes: int) -> None:
        self.size_bytes = 0
        self.overflows = 0
        self._cgroup = cgroup
        self._budget_bytes = budget_bytes
        self._zram: Zram | None = None
        self._followed_bytes = -1  # what the device took when the limit was set last
        self._changes = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def used_bytes(self) -> int:
        """The memory that the device takes; 0 if there is none."""
        zram = self._zram
        try:
            return zram.used_bytes if zram else 0
        except OSError:  # the device is being removed
            return 0

    def change(self, size_bytes: int) -> None:
        """Remove the old device, if there is one, and use a new one of this size; 0: none. Takes as
        long as the kernel needs to move what is swapped out back into memory.

        :raises Refused: there can be no such device, or the cgroup cannot swap. There is none then.
        """
        with self._changes:
            self._remove()
            if not size_bytes:
                return
            zram = Zram.make(size_bytes)
            try:
                self._cgroup.allow_swap(size_bytes, self._budget_bytes)
            except BaseException:
                zram.remove()
                raise
            self._end.clear()
            self._followed_bytes = -1
            # A thread: to lower the limit takes as long as the kernel swaps out.
            thread = threading.Thread(target=self._keep, args=(zram,), daemon=True)
            thread.start()
            self._zram, self._thread, self.size_bytes = zram, thread, size_bytes

    def _remove(self) -> None:
        if self._zram is None or self._thread is None:
            return
        self._end.set()
        self._thread.join()
        self._zram.remove()
        self._zram, self.size_bytes = None, 0
        self._cgroup.allow_swap(0, self._budget_bytes)

    def _keep(self, zram: Zram) -> None:
        over = 0
        while not self._end.wait(_PERIOD_S):
            over = 0 if self._follow(zram) else over + 1
            if over == _PERIODS_OVER:
                self.overflows += 1

    def _follow(self, zram: Zram) -> bool:
        """Set the cgroup's limit to the budget minus what the device takes, if that has changed.
        Return False if that failed."""
        try:
            # What the kernel swaps out for a lower limit makes the device take more memory, but in
            # each round less than in the round before.
            for _ in range(_ROUNDS):
                taken_bytes = zram.used_bytes
                if taken_bytes == self._followed_bytes:
                    break
                if not self._cgroup.set_limit(self._budget_bytes - taken_bytes):
                    return False
                self._followed_bytes = taken_bytes
        except OSError:  # somebody else has removed the device: too little can be swapped out
            return False
        return True  # also if the device still grows: the next call goes on

"""The memory budget of a host: how much its guests may use together, and how much they use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hintfleet.errors import Refused
from hintfleet.settings import Driver
from hintfleet.v1 import host_pb2
from host_agent.budget.memory_cgroup import MemoryCgroup
from host_agent.budget.swap import Swap


@dataclass(kw_only=True)
class Budget:
    """A host's memory budget.

    :ivar cgroup: keeps the guests of one driver within the budget; None if it is only watched.
    :ivar swap: the cgroup's swap, which may have no device; None if there is no cgroup.
    :ivar why_watched: why no cgroup could be made; empty if there is one, or none was asked for.
    """

    limit_bytes: int
    cgroup: MemoryCgroup | None = None
    swap: Swap | None = None
    why_watched: str = ""

    @classmethod
    def enforced(cls, limit_bytes: int, driver: Driver) -> Budget:
        """Return a budget that a cgroup enforces for guests of this driver; if no cgroup can be
        made, a budget that is only watched."""
        try:
            cgroup = MemoryCgroup.make(limit_bytes, driver)
        except Refused as error:
            return cls(limit_bytes=limit_bytes, why_watched=error.message)
        return cls(limit_bytes=limit_bytes, cgroup=cgroup, swap=Swap(cgroup, limit_bytes))

    @property
    def partition(self) -> str:
        """The libvirt partition to make domains in; empty for libvirt's default."""
        return self.cgroup.partition if self.cgroup else ""

    def contain(self, pid: int) -> None:
        """Put the process of an embedded guest into the cgroup, if there is one for such guests.

        :raises Refused: the kernel does not take it.
        """
        if self.cgroup is not None and not self.partition:
            self.cgroup.add(pid)

    @property
    def swap_bytes(self) -> int:
        """The size of the swap; 0 if there is none."""
        return self.swap.size_bytes if self.swap else 0

    def use_swap(self, size_bytes: int) -> None:
        """Let the kernel swap guests out to a zram device of this size from now on; 0: not at all.
        The memory that the device takes counts into the budget. Call this only while no
        guest runs.

        :raises Refused: no cgroup enforces the budget, no device can be made, or the cgroup cannot
            swap. There is no swap then.
        """
        if self.swap is not None:
            self.swap.change(size_bytes)
        elif size_bytes:
            raise Refused(
                "zram needs a memory budget that a cgroup enforces",
                hint=f"here it is only watched: {self.why_watched or 'nobody asked for a cgroup'}",
            )

    def message(self) -> host_pb2.Budget:
        """Return how the budget is kept, as a message of the control API."""
        return host_pb2.Budget(
            cgroup=str(self.cgroup.folder) if self.cgroup else "",
            why_watched=self.why_watched,
        )

    def use(self, resident_bytes: Iterable[int]) -> host_pb2.BudgetUse:
        """Return how much of the budget is used.

        :param resident_bytes: of each guest; their sum counts if there is no cgroup.
        """
        use = host_pb2.BudgetUse(limit_bytes=self.limit_bytes, enforced=bool(self.cgroup))
        if self.cgroup is None:
            use.used_bytes = sum(resident_bytes)
        else:
            use.used_bytes, use.oom_count = self.cgroup.used_bytes, self.cgroup.oom_count
        if self.swap is not None:
            use.used_bytes += self.swap.used_bytes
            use.oom_count += self.swap.overflows
        return use

    def close(self) -> None:
        """Remove the cgroup and the swap, if there are any. All guests must have ended before."""
        self.use_swap(0)
        if self.cgroup is not None:
            self.cgroup.remove()

"""The kernel's pool of 2 MiB huge pages: what it says, and growing and shrinking it.

Documentation/admin-guide/mm/hugetlbpage.rst. The pool must be nobody else's: every
number is read back after it was written.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused, TransientError
from hintfleet.units import MIB

HUGE_PAGE_BYTES = 2 * MIB
_MAP_HUGETLB = 0x40000
_MAP_HUGE_2MB = 21 << 26


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """Pages of the pool: all, free ones, and free ones that a mapping has reserved."""

    total: int
    free: int
    reserved: int
    surplus: int

    @property
    def all_reserved(self) -> bool:
        """No page is used, none can be taken by anybody else, none is surplus."""
        return self.total == self.free == self.reserved and not self.surplus


class HugetlbPool:
    """Grows the pool and holds what it grew by."""

    def __init__(self, sys_root: Path = Path("/sys"), proc_root: Path = Path("/proc")) -> None:
        self._pool = sys_root / "kernel/mm/hugepages/hugepages-2048kB"
        self._sys_root = sys_root
        self._proc_root = proc_root
        self._reservations: list[mmap.mmap] = []

    def check_unused(self) -> None:
        """Refuse where free hugetlb pages may be used, moved or replaced under us.

        :raises Refused: says what stands in the way and what to do.
        """
        if not self._pool.is_dir():
            raise Refused(
                "this kernel has no 2 MiB huge pages", hint="a kernel with CONFIG_HUGETLBFS"
            )
        overcommit = self._number("nr_overcommit_hugepages")
        if overcommit:
            raise Refused(
                f"nr_overcommit_hugepages is {overcommit}: others may take huge pages",
                hint="sysctl vm.nr_overcommit_hugepages=0",
            )
        state = self.state()
        if state.total:
            raise Refused(
                f"the hugetlb pool is in use: nr_hugepages is {state.total}",
                hint="sysctl vm.nr_hugepages=0, or use the kmod isolator",
            )
        if self._cma_kib():
            raise Refused(
                f"this guest has CMA ({self._cma_kib()} kB): it may replace free huge pages",
                hint="boot with cma=0, or use the kmod isolator",
            )
        if any(self._virtio_mem_devices()):
            raise Refused(
                "this guest has virtio-mem: unplugging may replace free huge pages",
                hint="use the kmod isolator",
            )

    def state(self) -> PoolState:
        """What the kernel says of the pool now."""
        return PoolState(
            total=self._number("nr_hugepages"),
            free=self._number("free_hugepages"),
            reserved=self._number("resv_hugepages"),
            surplus=self._number("surplus_hugepages"),
        )

    def grow(self, pages: int) -> int:
        """Add up to so many pages and reserve them; returns how many came.

        :raises TransientError: somebody else uses the pool. It is as it was before
            this call.
        """
        before = self.state().total
        self._set(before + pages)
        came = self.state().total - before
        if came <= 0:
            return 0
        try:
            self._reserve(came)
        except OSError as error:
            self._set(before)
            raise TransientError(f"cannot reserve {came} huge pages: {error.strerror}") from error
        state = self.state()
        if not state.all_reserved or state.total != before + came:
            self._reservations.pop().close()
            self._set(before)
            raise TransientError(f"somebody else uses the hugetlb pool: {state}")
        return came

    def adopt(self) -> int:
        """Reserve all that is in the pool already; returns how many pages that is.

        :raises Refused: some of it is used.
        """
        state = self.state()
        if state.free != state.total or state.reserved or state.surplus:
            raise Refused(
                f"the hugetlb pool that an earlier agent left is in use: {state}",
                hint="stop what uses it, then sysctl vm.nr_hugepages=0",
            )
        if state.total:
            self._reserve(state.total)
        return state.total

    def empty(self) -> None:
        """Give everything back to the buddy allocator."""
        while self._reservations:
            self._reservations.pop().close()
        self._set(0)

    def close(self) -> None:
        """Let the reservations go; the pages stay in the pool (I4)."""
        while self._reservations:
            self._reservations.pop().close()

    def _reserve(self, pages: int) -> None:
        """Map so many pages without touching them: the kernel sets them aside for us."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_HUGE_2MB
        self._reservations.append(mmap.mmap(-1, pages * HUGE_PAGE_BYTES, flags=flags))

    def _number(self, name: str) -> int:
        return int((self._pool / name).read_text())

    def _set(self, pages: int) -> None:
        (self._pool / "nr_hugepages").write_text(str(pages))

    def _cma_kib(self) -> int:
        for line in (self._proc_root / "meminfo").read_text().splitlines():
            if line.startswith("CmaTotal:"):
                return int(line.split()[1])
        return 0

    def _virtio_mem_devices(self) -> list[Path]:
        driver = self._sys_root / "bus/virtio/drivers/virtio_mem"
        return list(driver.glob("virtio*")) if driver.is_dir() else []

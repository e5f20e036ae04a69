"""The kernel's pool of 2 MiB huge pages: check that it is safe to use, fill it, empty it.

Source: Documentation/admin-guide/mm/hugetlbpage.rst. Nobody else may use the pool. A file on a
hugetlbfs of our own reserves the pool's pages. The reservation of a file outlives the process
(fs/hugetlbfs/inode.c), while that of a mapping alone would not. So nobody can use the chunks that
a dead agent left isolated (I4). The kernel may move fewer pages into the pool than it is asked to,
so its counts are read back afterwards.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guest_agent.memory.kernel import (
    KPF_BUDDY,
    KPF_HUGE,
    FreeLists,
    PageFlags,
    ZoneInfo,
    free_chunk_count,
    mount_hugetlbfs,
    parse_buddyinfo,
    parse_zoneinfo,
    present_spans,
)
from hintfleet.errors import Refused, TransientError
from hintfleet.ranges import RangeSet
from hintfleet.settings import HUGE_PAGE_ORDER
from hintfleet.system.file_lock import lock_file
from hintfleet.units import PAGE_BYTES

CHUNK_ORDER = HUGE_PAGE_ORDER
CHUNK_PAGES = 1 << CHUNK_ORDER
CHUNK_BYTES = PAGE_BYTES << CHUNK_ORDER

_SMALLEST_RESERVE_CHUNKS = 16
_RESERVE_SHARE = 16
_POOL_NAME = "hugepages-2048kB"


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """The kernel's counts of the pool, in pages of 2 MiB.

    :ivar total: all pages of the pool.
    :ivar free: pages that are not in use.
    :ivar reserved: free pages that are promised to a file or a mapping.
    :ivar surplus: pages beyond the number that was set: of overcommit, or in use as it was lowered.
    """

    total: int
    free: int
    reserved: int
    surplus: int

    @property
    def all_reserved(self) -> bool:
        """Whether all pages are free and reserved, so that nobody can take one, and none is
        surplus."""
        return self.total == self.free == self.reserved and not self.surplus


class HugetlbPool:
    """Moves free chunks of the guest's kernel into the pool, and back."""

    def __init__(
        self,
        mount_point: Path = Path("/run/hintfleet-hugetlb"),
        sys_root: Path = Path("/sys"),
        proc_root: Path = Path("/proc"),
    ) -> None:
        """Prepare; nothing is read or changed before `open`."""
        self._mount_point = mount_point
        self._file = mount_point / "isolated"
        self._lock = mount_point.with_suffix(".lock")
        self._pool = sys_root / "kernel/mm/hugepages" / _POOL_NAME
        self._sys_root = sys_root
        self._proc_root = proc_root
        self._flags: PageFlags | None = None
        self._free_lists: FreeLists | None = None
        self._fd = self._lock_fd = -1

    # Methods that the isolator calls, with their helpers

    def open(self) -> RangeSet:
        """Take over the pool, and return the chunks that an earlier agent left isolated in it.

        :raises Refused: there is no such pool, it cannot be used safely, somebody else uses it, or
            this process may not use it. The message says why and what to do. No chunk was moved
            into the pool.
        :raises TransientError: somebody else has just begun to use the pool.
        """
        self._refuse_if_unsafe()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._lock_pool()
            self._flags = PageFlags(str(self._proc_root / "kpageflags"))
            self._free_lists = FreeLists(CHUNK_ORDER, str(self._proc_root / "buddyinfo"))
            self._mount()
            if self._file.exists():
                self._adopt()
            elif total := self.state().total:
                raise Refused(
                    f"the hugetlb pool is in use: nr_hugepages is {total}",
                    hint="sysctl vm.nr_hugepages=0, or use the kmod isolator",
                )
            chunks = self.chunks()
            undo.pop_all()
        return chunks

    def free_chunks(self) -> int:
        """Return how many chunks are in the free lists of the buddy allocator, so not in the pool.
        Costs one small read."""
        if self._free_lists is None:
            raise Refused("the hugetlb pool is not open")
        return self._free_lists.free_chunk_count()

    def free_ranges(self) -> RangeSet:
        """Return the chunks whose first page is in the free lists of the buddy allocator.

        Other pages of such a chunk may be in use. The caller counts the chunk as absent only if the
        host reports no page of it as resident.
        """
        return RangeSet((pfn, CHUNK_PAGES) for pfn in self._chunks_with(KPF_BUDDY))

    def reserve_chunks(self) -> int:
        """Return how many free chunks a pass must leave to the guest.

        If so many are left, growing the pool never makes the kernel reclaim or compact memory,
        and the guest can still allocate.
        """
        return max(_SMALLEST_RESERVE_CHUNKS, _reserve_chunks(self._zones()))

    def grow(self, chunks: int) -> int:
        """Move up to `chunks` free chunks into the pool, reserve them, and return how many moved.

        :raises TransientError: somebody else uses the pool. What this call has moved was given
            back.
        """
        state = self.state()
        if not state.all_reserved:
            raise _conflict(state)
        before = state.total
        # Make the file first: if this agent dies, the file shows the next agent that the chunks in
        # the pool are ours.
        self._open_file()
        self._move_in(before, chunks)
        moved = max(0, self.state().total - before)
        try:
            self._reserve(before, moved)
        except TransientError:
            os.ftruncate(self._fd, before * CHUNK_BYTES)
            # Not `before`: somebody else may have put pages into the pool meanwhile.
            self._set_total(max(before, self.state().total - moved))
            raise
        return moved

    def _move_in(self, before: int, chunks: int) -> None:
        """Move up to `chunks` free chunks into the pool, which has `before` chunks in all.

        If there are several NUMA nodes, each node keeps its own reserve. If there is only one, the
        caller must have left the reserve out of `chunks`.
        """
        free = parse_buddyinfo((self._proc_root / "buddyinfo").read_text())
        nodes = sorted({node for node, _ in free})
        if len(nodes) == 1:
            self._set_total(before + chunks)
            return
        # Set the number of pages of each node, not the total: for the total, the kernel takes pages
        # from each node in turn, and reclaims and compacts memory on a node that has no free chunk
        # (mm/hugetlb.c: alloc_pool_huge_page, or alloc_pool_huge_folio in later kernels).
        zones = self._zones()
        for node in nodes:
            free_blocks = [counts for (its_node, _), counts in free.items() if its_node == node]
            reserve = _reserve_chunks(zone for zone in zones if zone.node == node)
            movable = max(0, free_chunk_count(free_blocks, CHUNK_ORDER) - reserve)
            moved = min(movable, chunks)
            chunks -= moved
            pool = self._sys_root / f"devices/system/node/node{node}/hugepages/{_POOL_NAME}"
            total = pool / "nr_hugepages"
            total.write_text(str(int(total.read_text()) + moved))

    def _zones(self) -> list[ZoneInfo]:
        return parse_zoneinfo((self._proc_root / "zoneinfo").read_text())

    def chunks(self) -> RangeSet:
        """Return the chunks in the pool, after checking that all of them are ours.

        :raises TransientError: somebody else put pages into the pool, or uses some of its pages.
            Page flags do not show which pages are ours.
        """
        first_pfns = self._chunks_with(KPF_HUGE)
        # Read the counts after the flags: then pages that somebody adds while the flags are read
        # are in the counts, and the check below finds them.
        state = self.state()
        if not state.all_reserved or state.total != len(first_pfns):
            raise _conflict(state)
        return RangeSet((pfn, CHUNK_PAGES) for pfn in first_pfns)

    def _chunks_with(self, flag: int) -> list[int]:
        if self._flags is None:
            raise Refused("the hugetlb pool is not open")
        spans = present_spans(self._sys_root, self._proc_root)
        return self._flags.chunks_with(flag, spans, CHUNK_ORDER)

    def empty(self) -> None:
        """Give all our chunks back to the buddy allocator, and remove the file."""
        if self._fd >= 0:
            ours = os.fstat(self._fd).st_size // CHUNK_BYTES
            os.ftruncate(self._fd, 0)
            self._set_total(max(0, self.state().total - ours))  # somebody may have lowered it
            self._file.unlink()
            self._close_file()

    def close(self) -> None:
        """Close all files and release the lock; the chunks stay in the pool, reserved (I4)."""
        for file in (self._flags, self._free_lists):
            if file is not None:
                file.close()
        self._flags = self._free_lists = None
        self._close_file()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def state(self) -> PoolState:
        """Return the kernel's counts of the pool now."""
        return PoolState(
            total=self._number("nr_hugepages"),
            free=self._number("free_hugepages"),
            reserved=self._number("resv_hugepages"),
            surplus=self._number("surplus_hugepages"),
        )

    # Checks whether it is safe to use the pool

    def _refuse_if_unsafe(self) -> None:
        if not self._pool.is_dir():
            raise Refused(
                "this kernel has no 2 MiB huge pages", hint="a kernel with CONFIG_HUGETLBFS"
            )
        if overcommit := self._number("nr_overcommit_hugepages"):
            raise Refused(
                f"nr_overcommit_hugepages is {overcommit}: others may take huge pages",
                hint="sysctl vm.nr_overcommit_hugepages=0, or use the kmod isolator",
            )
        # Page flags do not show the size of a huge page: pages of another size would be taken for
        # ours.
        for others in sorted(self._pool.parent.glob("hugepages-*")):
            for name in ("nr_hugepages", "nr_overcommit_hugepages"):
                path = others / name
                if others != self._pool and path.exists() and (count := int(path.read_text())):
                    raise Refused(
                        f"huge pages of another size are used: {name} of {others.name} is {count}",
                        hint=f"echo 0 > {path}, or use the kmod isolator",
                    )
        # CMA and virtio-mem call alloc_contig_range(), which replaces free huge pages that are
        # in its way (mm/hugetlb.c: isolate_or_dissolve_huge_page): the guest could use a chunk
        # that is in flight.
        if cma_kib := self._cma_kib():
            raise Refused(
                f"this guest has CMA ({cma_kib} kB), which may replace free huge pages",
                hint="boot with cma=0, or use the kmod isolator",
            )
        if any((self._sys_root / "bus/virtio/drivers/virtio_mem").glob("virtio*")):
            raise Refused(
                "this guest has virtio-mem, which may replace free huge pages",
                hint="use the kmod isolator",
            )

        # With page_poison, free_pages_prepare() (mm/page_alloc.c) writes to each page that leaves
        # the pool.
        for parameter in (self._proc_root / "cmdline").read_text(errors="replace").split():
            name, _, value = parameter.partition("=")
            if name == "page_poison" and value.lower() in ("1", "y", "yes", "on"):
                raise Refused(
                    "this kernel writes a pattern to pages as they are freed (page_poison=1):"
                    " memory that hugetlb has hinted would become resident again",
                    hint="boot with page_poison=0",
                )

    def _cma_kib(self) -> int:
        for line in (self._proc_root / "meminfo").read_text().splitlines():
            if line.startswith("CmaTotal:"):
                return int(line.split()[1])
        return 0

    def _adopt(self) -> None:
        """Reserve all chunks that an earlier agent of this boot left, also those that it had only
        moved; if its file is empty, it had reserved none: then give all of them back.

        :raises Refused: somebody uses some of them, or has put pages into the pool meanwhile.
        """
        self._open_file()
        file_is_empty = not os.fstat(self._fd).st_size
        state = self.state()
        if state.surplus and state.total == state.free == state.reserved and not file_is_empty:
            # Somebody has lowered the number. The kernel frees no reserved page, so they are
            # surplus until the number is raised again (mm/hugetlb.c: set_max_huge_pages).
            self._set_total(state.total)
            state = self.state()
        if state.free != state.total or state.surplus or (file_is_empty and state.reserved):
            raise Refused(
                f"the hugetlb pool that an earlier agent left is in use: {state}",
                hint="stop what uses it, then start the agent again",
            )
        if file_is_empty:
            # Nothing is reserved: the earlier agent died in `grow` before its first reservation,
            # or in `empty`. So none of its chunks is in flight, and all can be given back.
            self._set_total(0)
            self.empty()
            return
        try:
            self._reserve(0, state.total)
        except TransientError as error:
            raise Refused(error.message, hint="stop what else uses huge pages") from error

    def _lock_pool(self) -> None:
        """Lock the pool against other agents, until `close` or the end of this process.

        :raises Refused: another agent holds the lock, or this process may not lock it.
        """
        # Without the lock, two agents would each release the chunks that the other one has in
        # flight (I1). The kernel releases the lock of a dead agent.
        try:
            fd = lock_file(self._lock)
        except OSError as error:
            hint = "run the guest agent as root"
            raise Refused(f"the hugetlb pool cannot be locked: {error}", hint=hint) from error
        if fd is None:
            raise Refused("another guest agent uses the hugetlb pool", hint="stop that one first")
        self._lock_fd = fd

    # The file that holds the reservation: it exists at least while our chunks are in the pool

    def _mount(self) -> None:
        """Mount a hugetlbfs, unless an earlier agent of this boot has mounted it."""
        self._mount_point.mkdir(mode=0o700, parents=True, exist_ok=True)
        # On a hugetlbfs, statfs returns the huge page size as block size (fs/hugetlbfs/inode.c).
        if os.statvfs(self._mount_point).f_bsize != CHUNK_BYTES:
            mount_hugetlbfs(self._mount_point)

    def _open_file(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reserve(self, before: int, chunks: int) -> None:
        """Make the file reserve `chunks` pages more than the `before` pages that it has reserved.

        Nothing is written to these pages.

        :raises TransientError: somebody else uses the pool: the counts are not as they should be.
        """
        os.ftruncate(self._fd, (before + chunks) * CHUNK_BYTES)
        if chunks:
            at, length = before * CHUNK_BYTES, chunks * CHUNK_BYTES
            # The kernel reserves pages when a file is mapped shared, and keeps the reservation
            # with the file after the mapping is gone. If the kernel cannot reserve them, mmap
            # fails, and the counts below show it.
            with contextlib.suppress(OSError):
                mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, offset=at).close()
        state = self.state()
        if not state.all_reserved or state.total != before + chunks:
            raise _conflict(state)

    def _number(self, name: str) -> int:
        return int((self._pool / name).read_text())

    def _set_total(self, chunks: int) -> None:
        (self._pool / "nr_hugepages").write_text(str(chunks))


def _conflict(state: PoolState) -> TransientError:
    return TransientError(f"somebody else uses the hugetlb pool: {state}")


def _reserve_chunks(zones: Iterable[ZoneInfo]) -> int:
    """Return how many chunks of these zones must stay free for the guest and its kernel."""
    # A sixteenth is more than what a zone keeps back from allocations of huge pages: a 256th or a
    # 32nd of the zones above it (mm/page_alloc.c: sysctl_lowmem_reserve_ratio).
    pages = [zone.present_pages // _RESERVE_SHARE + zone.low_watermark_pages for zone in zones]
    return sum(pages) // CHUNK_PAGES

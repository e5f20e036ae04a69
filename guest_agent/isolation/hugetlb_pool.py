"""The kernel's pool of 2 MiB huge pages: what may be moved into it, and moving it.

Documentation/admin-guide/mm/hugetlbpage.rst. The pool must be nobody else's. Its
pages are reserved by a file on a hugetlbfs of our own, never by a mapping alone: a
reservation of a file outlives the process (fs/hugetlbfs/inode.c), so that nobody can
use what a dead agent left isolated (I4). Every number is read back after it was written.
"""

from __future__ import annotations

import contextlib
import ctypes
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

# include/uapi/linux/mount.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """Pages of the pool: all, free ones, and free ones that are reserved."""

    total: int
    free: int
    reserved: int
    surplus: int

    @property
    def all_reserved(self) -> bool:
        """No page is used, none can be taken by anybody else, none is surplus."""
        return self.total == self.free == self.reserved and not self.surplus


class HugetlbPool:
    """Moves free chunks of the guest's kernel into the pool, and back."""

    def __init__(
        self,
        mount_point: Path = Path("/run/hintfleet-hugetlb"),
        sys_root: Path = Path("/sys"),
        proc_root: Path = Path("/proc"),
    ) -> None:
        """Nothing is looked at or changed before `open`."""
        self._mount_point = mount_point
        self._file = mount_point / "isolated"
        self._lock = mount_point.with_suffix(".lock")
        self._pool = sys_root / "kernel/mm/hugepages" / _POOL_NAME
        self._sys_root = sys_root
        self._proc_root = proc_root
        self._flags: PageFlags | None = None
        self._free_lists: FreeLists | None = None
        self._fd = self._lock_fd = -1

    # For the isolator

    def open(self) -> RangeSet:
        """Make the pool ours; returns the chunks that an earlier agent left in it.

        :raises Refused: free pages of the pool may be used, moved or replaced under
            us; says what stands in the way and what to do.
        :raises TransientError: somebody began to use it just now.
        """
        self._refuse_if_unsafe()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._lock_out_others()
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
        """Chunks in the free lists: one small read."""
        if self._free_lists is None:
            raise Refused("the hugetlb pool is not open")
        return self._free_lists.free_chunk_count()

    def free_ranges(self) -> RangeSet:
        """The chunks whose first page is in the free lists: so is all of such a chunk, if
        nothing in it was ever touched."""
        return RangeSet((pfn, CHUNK_PAGES) for pfn in self._chunks_with(KPF_BUDDY))

    def reserve_chunks(self) -> int:
        """Free chunks to leave alone, so that growing the pool never makes the kernel
        reclaim or compact memory, and the guest can go on allocating meanwhile.

        A sixteenth covers what lower zones keep from such allocations (a 256th of the
        zones above, mm/page_alloc.c: setup_per_zone_lowmem_reserve).
        """
        return max(_SMALLEST_RESERVE_CHUNKS, _reserve_chunks(self._zones()))

    def grow(self, chunks: int) -> int:
        """Move up to so many free chunks into the pool and reserve them; how many came.

        :raises TransientError: somebody else uses the pool. It is as it was before.
        """
        state = self.state()
        if not state.all_reserved:
            raise _shared(state)
        before = state.total
        # First the file, which says that what is in the pool is ours, should we die.
        self._open_file()
        self._move_in(before, chunks)
        came = max(0, self.state().total - before)
        try:
            self._reserve(before, came)
        except TransientError:
            os.ftruncate(self._fd, before * CHUNK_BYTES)
            self._set_total(before)
            raise
        return came

    def _move_in(self, before: int, chunks: int) -> None:
        """On each NUMA node no more than it can spare. The kernel would go round the nodes,
        and reclaim and compact memory where none is free (mm/hugetlb.c:
        alloc_pool_huge_page)."""
        free = parse_buddyinfo((self._proc_root / "buddyinfo").read_text())
        nodes = sorted({node for node, _ in free})
        if len(nodes) == 1:
            self._set_total(before + chunks)
            return
        zones = self._zones()
        for node in nodes:
            free_blocks = [counts for (its_node, _), counts in free.items() if its_node == node]
            reserve = _reserve_chunks(zone for zone in zones if zone.node == node)
            room = max(0, free_chunk_count(free_blocks, CHUNK_ORDER) - reserve)
            here = min(room, chunks)
            chunks -= here
            pool = self._sys_root / f"devices/system/node/node{node}/hugepages/{_POOL_NAME}"
            total = pool / "nr_hugepages"
            total.write_text(str(int(total.read_text()) + here))

    def _zones(self) -> list[ZoneInfo]:
        return parse_zoneinfo((self._proc_root / "zoneinfo").read_text())

    def chunks(self) -> RangeSet:
        """What is in the pool: all ours, for all of it is reserved.

        :raises TransientError: somebody else put pages into it, or uses some: these could not
            be told from ours.
        """
        first_pfns = self._chunks_with(KPF_HUGE)
        state = self.state()  # after the look: whoever came before it is seen by one of them
        if not state.all_reserved or state.total != len(first_pfns):
            raise _shared(state)
        return RangeSet((pfn, CHUNK_PAGES) for pfn in first_pfns)

    def _chunks_with(self, flag: int) -> list[int]:
        if self._flags is None:
            raise Refused("the hugetlb pool is not open")
        spans = present_spans(self._sys_root, self._proc_root)
        return self._flags.chunks_with(flag, spans, CHUNK_ORDER)

    def empty(self) -> None:
        """Give everything that is ours back to the buddy allocator."""
        if self._fd >= 0:
            ours = os.fstat(self._fd).st_size // CHUNK_BYTES
            os.ftruncate(self._fd, 0)
            self._set_total(self.state().total - ours)
            self._file.unlink()
            self._close_file()

    def close(self) -> None:
        """Let go; the chunks stay in the pool, and reserved (I4)."""
        for file in (self._flags, self._free_lists):
            if file is not None:
                file.close()
        self._flags = self._free_lists = None
        self._close_file()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def state(self) -> PoolState:
        """What the kernel says of the pool now."""
        return PoolState(
            total=self._number("nr_hugepages"),
            free=self._number("free_hugepages"),
            reserved=self._number("resv_hugepages"),
            surplus=self._number("surplus_hugepages"),
        )

    # Whether the pool can be ours

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
        # Page flags do not tell of which size a huge page is: theirs would be taken for ours.
        for others in sorted(self._pool.parent.glob("hugepages-*")):
            for name in ("nr_hugepages", "nr_overcommit_hugepages"):
                path = others / name
                if others != self._pool and path.exists() and (count := int(path.read_text())):
                    raise Refused(
                        f"huge pages of another size are used: {name} of {others.name} is {count}",
                        hint=f"echo 0 > {path}, or use the kmod isolator",
                    )
        # alloc_contig_range() replaces free huge pages that are in its way (mm/hugetlb.c:
        # isolate_or_dissolve_huge_page); these two call it.
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

        # free_pages_prepare() writes to each page that leaves the pool.
        for parameter in (self._proc_root / "cmdline").read_text().split():
            name, _, value = parameter.partition("=")
            if name == "page_poison" and value.lower() in ("1", "y", "yes", "on"):
                raise Refused(
                    "this kernel writes a pattern to pages as they are freed (page_poison=1):"
                    " what hugetlb gave back would be resident again",
                    hint="boot with page_poison=0",
                )

    def _cma_kib(self) -> int:
        for line in (self._proc_root / "meminfo").read_text().splitlines():
            if line.startswith("CmaTotal:"):
                return int(line.split()[1])
        return 0

    def _adopt(self) -> None:
        """Reserve all that an earlier agent of this boot left, if nobody uses it."""
        self._open_file()
        if not os.fstat(self._fd).st_size:  # nothing is reserved: it was taking or giving back
            self._set_total(0)
            self.empty()
            return
        state = self.state()
        if state.free != state.total or state.surplus:
            raise Refused(
                f"the hugetlb pool that an earlier agent left is in use: {state}",
                hint="stop what uses it, then start the agent again",
            )
        try:
            self._reserve(0, state.total)
        except TransientError as error:
            raise Refused(error.message, hint="stop what else uses huge pages") from error

    def _lock_out_others(self) -> None:
        """Be the only agent: two would each release what the other has in flight (I1). The
        kernel lets go of the lock when its holder is dead, and not before."""
        fd = lock_file(self._lock)
        if fd is None:
            raise Refused(
                "another guest agent works with the hugetlb pool", hint="stop that one first"
            )
        self._lock_fd = fd

    # The file that holds the reservation; it is there while something is in the pool

    def _mount(self) -> None:
        """Mount a hugetlbfs, if this is the first agent of this boot."""
        self._mount_point.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.statvfs(self._mount_point).f_bsize != CHUNK_BYTES:
            _mount_hugetlbfs(self._mount_point)

    def _open_file(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reserve(self, before: int, chunks: int) -> None:
        """Have the file hold `chunks` more pages than `before`; they are never touched.

        :raises TransientError: somebody else took one.
        """
        os.ftruncate(self._fd, (before + chunks) * CHUNK_BYTES)
        if chunks:
            at, length = before * CHUNK_BYTES, chunks * CHUNK_BYTES
            # The kernel reserves as the mapping is made, and keeps that with the file.
            with contextlib.suppress(OSError):
                mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, offset=at).close()
        state = self.state()
        if not state.all_reserved or state.total != before + chunks:
            raise _shared(state)

    def _number(self, name: str) -> int:
        return int((self._pool / name).read_text())

    def _set_total(self, chunks: int) -> None:
        (self._pool / "nr_hugepages").write_text(str(chunks))


def _shared(state: PoolState) -> TransientError:
    return TransientError(f"somebody else uses the hugetlb pool: {state}")


def _reserve_chunks(zones: Iterable[ZoneInfo]) -> int:
    """What is left alone of some zones."""
    pages = [zone.present_pages // _RESERVE_SHARE + zone.low_watermark_pages for zone in zones]
    return sum(pages) // CHUNK_PAGES


def _mount_hugetlbfs(mount_point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if libc.mount(b"none", bytes(mount_point), b"hugetlbfs", flags, b"pagesize=2M,mode=0700"):
        raise Refused(
            f"cannot mount hugetlbfs at {mount_point}: {os.strerror(ctypes.get_errno())}",
            hint="run the guest agent as root, on a kernel with CONFIG_HUGETLBFS",
        )

"""Isolation by the hintfleet kernel module: /dev/hintfleet (deploy/kmod/hintfleet.h).

The kernel's page reporting isolates up to 32 free blocks, each a chunk or larger; the module shows
them as one batch. Once an agent has read the batch, its blocks stay isolated until that agent or a
later one acknowledges or returns the batch. A batch that nobody reads is taken back after a second,
or when the device is closed. The module shows the next batch only after the one before was released
or taken back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread

from guest_agent.isolation.isolator import HeldBack, UsedPages, nothing_held_back
from guest_agent.memory.kernel import KPF_BUDDY, FreeLists, PageFlags, present_spans
from guest_agent.procfs import mem_used_pages
from hintfleet.errors import Refused
from hintfleet.ranges import EMPTY, Range, RangeSet
from hintfleet.settings import DEFAULT_CHUNK_ORDER, MAX_ORDER, IsolatorKind

DEVICE = "/dev/hintfleet"

# Layouts of struct hintfleet_batch, hintfleet_range and hintfleet_status (hintfleet.h).
_CAPACITY = 32
_BATCH_HEADER = struct.Struct("=QII")
_RANGE = struct.Struct("=QQ")
_BATCH_BYTES = _BATCH_HEADER.size + _CAPACITY * _RANGE.size
_STATUS = struct.Struct("=QQII")
_SEQ = struct.Struct("=Q")

_BATCH_STILL_ISOLATED = 1 << 0
_RUNNING = 1 << 0

# include/uapi/asm-generic/ioctl.h: direction, size, type, number
_IOC_WRITE, _IOC_READ = 1, 2
_IOC_ACK = _IOC_WRITE << 30 | _SEQ.size << 16 | ord("h") << 8 | 1
_IOC_REPORT_NOW = ord("h") << 8 | 2
_IOC_REFUSE = _IOC_WRITE << 30 | struct.calcsize("=I") << 16 | ord("h") << 8 | 5
_IOC_RETURN = _IOC_WRITE << 30 | _SEQ.size << 16 | ord("h") << 8 | 4
_IOC_STATUS = _IOC_READ << 30 | _STATUS.size << 16 | ord("h") << 8 | 3

# UNREAD_TIMEOUT in hintfleet_kmod.c: how long the module shows a batch that nobody reads.
_UNREAD_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of the module; its ranges are isolated.

    :ivar still_isolated: whether an earlier agent has read this batch. If so, release it only after
        a Welcome.
    """

    seq: int
    still_isolated: bool
    ranges: list[Range]


def parse_batch(data: bytes) -> Batch:
    """Parse a struct hintfleet_batch.

    :raises Refused: the size or the number of ranges is wrong, so the module has another version
        than this agent.
    """
    seq, range_count, flags = _BATCH_HEADER.unpack_from(data.ljust(_BATCH_BYTES, b"\0"))
    if len(data) != _BATCH_BYTES or range_count > _CAPACITY:
        raise Refused(
            f"{DEVICE} shows {len(data)} bytes as a batch of {range_count} ranges",
            hint="load the module of the same version as the guest agent",
        )
    used = data[_BATCH_HEADER.size : _BATCH_HEADER.size + range_count * _RANGE.size]
    return Batch(
        seq=seq,
        still_isolated=bool(flags & _BATCH_STILL_ISOLATED),
        ranges=[Range(*pair) for pair in _RANGE.iter_unpack(used)],
    )


class KmodIsolator:
    """Takes free chunks from the kernel's page reporting.

    `isolate` returns a large batch of the module in parts; the batch is acknowledged or returned to
    the module when all its parts are released. So an allowance (policy pressure) is rounded up to
    whole batches: at chunk order 9 up to 64 MiB each or, where the kernel has merged chunks to
    order 10, 128 MiB.

    A batch of which more than a quarter should be held back is returned at once. The module then
    refuses what the kernel reports, until so much more is free that a batch is worth hinting.
    """

    name = IsolatorKind.KMOD
    # A freed chunk does not wake this agent: it only starts the kernel's delay of 2 s before a pass
    # (mm/page_reporting.c: PAGE_REPORTING_DELAY). `report_now` begins a pass at once.
    must_be_polled = True

    def __init__(self, device: str = DEVICE, *, chunk_order: int = DEFAULT_CHUNK_ORDER) -> None:
        """Prepare; nothing is opened before `start`."""
        self._device = device
        self._chunk_order = chunk_order
        self._free_lists: FreeLists | None = None
        self._absent = EMPTY
        """Chunks without memory on the host, as in `HugetlbIsolator`. Empty until the host's first
        list of what is resident."""
        self._resident_known = False
        self._held_back: HeldBack = nothing_held_back
        self._held_back_chunks = 0
        self._batch_pages = 0
        """Pages of the batch that was read and is not answered."""
        self._fd = -1
        self._seq = 0
        self._remaining: list[Range] = []
        self._parts_in_flight = 0
        self._all_hinted = True
        self._acknowledged = Event()
        self._closing = -1
        self._watcher: Thread | None = None

    def start(self, wake: Callable[[], None], held_back: HeldBack = nothing_held_back) -> RangeSet:
        self._held_back = held_back
        self._fd = _open(self._device)
        try:
            self._refuse(False)
        except OSError as error:
            os.close(self._fd)
            raise Refused(
                f"{self._device} does not know a request of this agent: {error.strerror}",
                hint="load the module of the same version as the guest agent",
            ) from error
        left = EMPTY
        batch = self._read()
        if batch is not None:
            self._seq = batch.seq
            if batch.still_isolated:
                self._remaining = batch.ranges
                left = self._take(len(self._remaining), sum(r.page_count for r in self._remaining))
            else:
                # The core takes new chunks only after a Welcome, so return this batch: the kernel
                # will report its chunks again.
                self._answer(_IOC_RETURN)
        self._closing = os.eventfd(0)
        self._watcher = Thread(target=self._watch, args=(wake,), name="kmod", daemon=True)
        self._watcher.start()
        return left

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        if not self._remaining and not self._parts_in_flight:
            batch = self._read()
            if batch is not None:
                self._seq, self._remaining = batch.seq, batch.ranges
                self._update_held_back()
                if not self._worth_hinting(self._batch_pages >> self._chunk_order):
                    self._remaining = []
                    # Refuse before the batch is returned: the kernel may begin its next pass at
                    # once after that.
                    self._refuse(True)
                    self._answer(_IOC_RETURN)
        return self._take(max_ranges, max_pages)

    def _worth_hinting(self, batch_chunks: int) -> bool:
        """Return whether so much is free that at most a quarter of a batch should be held back.

        A bound below a quarter would leave more memory unhinted in a guest that always holds a
        little back.
        """
        if not self._held_back_chunks:
            return True
        spare = self._free_chunks() - self._held_back_chunks
        return spare > 0 and 4 * spare >= 3 * batch_chunks

    def _free_chunks(self) -> int:
        """Return how many free chunks may be resident, those of an unanswered batch included."""
        if self._free_lists is None:
            self._free_lists = FreeLists(self._chunk_order)
        free = self._free_lists.free_chunk_count() + (self._batch_pages >> self._chunk_order)
        return free - (self._absent.page_count >> self._chunk_order)

    def _update_held_back(self) -> None:
        self._held_back_chunks = self._held_back(self.used_pages()).free >> self._chunk_order

    def used_pages(self) -> UsedPages | None:
        # Read the use first, then the state: then what is isolated by a pass that begins in between
        # is not taken for memory in use.
        used = mem_used_pages() - self._batch_pages
        unknown = not self._batch_pages and self._state() & _RUNNING
        return None if unknown else UsedPages(used, used)

    def _free_ranges(self) -> RangeSet:
        """Return the chunks that are free now, and some that are partly in use. The latter do not
        matter: the host has reported them as resident. If page flags cannot be read, return all
        memory: what was reserved at boot and never used then counts as free and absent, and as much
        more is held back."""
        spans = present_spans()
        try:
            flags = PageFlags()
        except Refused:
            return RangeSet((span.start, len(span)) for span in spans)
        with contextlib.closing(flags):
            pfns = flags.chunks_with(KPF_BUDDY, spans, self._chunk_order)
        return RangeSet((pfn, 1 << self._chunk_order) for pfn in pfns)

    def _refuse(self, refuse: bool) -> None:
        fcntl.ioctl(self._fd, _IOC_REFUSE, struct.pack("=I", refuse))

    def _take(self, max_ranges: int, max_pages: int) -> RangeSet:
        taken: list[Range] = []
        while self._remaining and len(taken) < max_ranges and max_pages > 0:
            pfn, page_count = self._remaining.pop()
            part = min(page_count, max_pages)
            taken.append(Range(pfn, part))
            max_pages -= part
            if part < page_count:
                self._remaining.append(Range(pfn + part, page_count - part))
        self._parts_in_flight += bool(taken)
        return RangeSet(taken)

    @property
    def unfinished(self) -> bool:
        return bool(self._remaining)

    def enough_ready(self) -> bool:
        return True  # a wake means that the module shows a batch, full or not: hint it at once

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        self._parts_in_flight -= bool(ranges)
        self._all_hinted &= hinted
        if hinted and self._resident_known:
            self._absent |= ranges
        if ranges and not self._remaining and not self._parts_in_flight:
            # A batch can only be acknowledged or returned as a whole. If the host did not act on
            # one part, return the whole batch: the kernel will report its chunks again.
            self._answer(_IOC_ACK if self._all_hinted else _IOC_RETURN)

    def _answer(self, request: int) -> None:
        fcntl.ioctl(self._fd, request, _SEQ.pack(self._seq))
        self._all_hinted = True
        self._batch_pages = 0
        self._acknowledged.set()

    def report_now(self, *, thorough: bool) -> None:  # noqa: ARG002 - the kernel knows
        self._refuse(False)
        fcntl.ioctl(self._fd, _IOC_REPORT_NOW)

    def refaulted(self, ranges: RangeSet) -> None:
        """Note what is not absent any more. (When such a chunk is freed, the kernel itself notices
        it.)"""
        if not self._resident_known:
            self._absent = self._free_ranges()
            self._resident_known = True
        self._absent -= ranges.whole_chunks(self._chunk_order)

    def idle(self) -> bool:
        """Return whether no pass runs or is planned, and the module has refused or taken back no
        chunk since the last `report_now`. While memory is held back, also return True if the next
        batch is not worth hinting, and have the module refuse all chunks."""
        # Cheap, even in an idle guest: the kernel's page reporting schedules a pass when a chunk
        # is freed. So it is enough to ask whether one is scheduled; no free list is scanned here.
        self._update_held_back()
        state = self._state()
        if not self._held_back_chunks:
            self._refuse(False)
            return not state
        most = _CAPACITY << MAX_ORDER - self._chunk_order
        worth = self._worth_hinting(min(self._free_chunks(), most))
        if not worth:
            # Refuse at each call: this cancels a pass that the kernel has planned for a chunk freed
            # since the last call. A pass that is refused only when it reports moves what is held
            # back to the end of the free lists, so that the guest would use it last.
            self._refuse(True)
        return not worth or not state

    def _state(self) -> int:
        """Return which of the bits HINTFLEET_RUNNING and HINTFLEET_MORE are set."""
        status = fcntl.ioctl(self._fd, _IOC_STATUS, bytes(_STATUS.size))
        _batch_count, _page_count, state, _order = _STATUS.unpack(status)
        return int(state)

    def isolated_pages(self) -> int:
        return self._batch_pages

    def tracker_bytes(self) -> int:
        return 0

    def close(self) -> None:
        if self._watcher is None:
            return
        os.eventfd_write(self._closing, 1)
        self._acknowledged.set()
        self._watcher.join()
        self._watcher = None
        os.close(self._closing)
        os.close(self._fd)
        if self._free_lists is not None:
            self._free_lists.close()

    def _watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` for each batch that the module shows, until `close`."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._closing, select.POLLIN)
        while not any(fd == self._closing for fd, _ in poll.poll()):
            wake()
            # Pause until the batch is answered, a second at most. The device stays readable until
            # the batch is read, and the core does not always read it now: without a pause, poll
            # would return again and again. After a second the module takes an unread batch back.
            self._acknowledged.wait(_UNREAD_TIMEOUT_S)
            self._acknowledged.clear()

    def _read(self) -> Batch | None:
        try:
            data = os.read(self._fd, _BATCH_BYTES)
        except BlockingIOError:
            return None
        batch = parse_batch(data)
        self._batch_pages = sum(one.page_count for one in batch.ranges)
        return batch


def _open(device: str) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hints = {
            errno.ENOENT: "load the module: insmod hintfleet_kmod.ko (deploy/kmod); if it does not"
            " load, dmesg says why: most often the guest's balloon has free page reporting on",
            errno.EBUSY: "another guest agent has it open; stop that one first",
            errno.EACCES: "run the guest agent as root",
            errno.EPERM: "allow the device in the agent's unit: DeviceAllow=/dev/hintfleet rw",
        }
        raise Refused(
            f"cannot isolate: opening {device}: {error.strerror}",
            hint=hints.get(error.errno or 0, ""),
        ) from error

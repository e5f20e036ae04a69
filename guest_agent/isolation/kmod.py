"""Isolation by the hintfleet kernel module: /dev/hintfleet (deploy/kmod/hintfleet.h).

The kernel pushes: its page reporting isolates up to 32 chunks, the module shows
them as one batch and keeps them isolated until that batch is acknowledged. There
is never more than one, so the next comes when the last is released.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread

from hintfleet.errors import Refused
from hintfleet.ranges import EMPTY, Range, RangeSet
from hintfleet.settings import IsolatorKind

DEVICE = "/dev/hintfleet"

# struct hintfleet_batch, struct hintfleet_range and struct hintfleet_status
_CAPACITY = 32
_BATCH_HEADER = struct.Struct("=QII")
_RANGE = struct.Struct("=QQ")
_BATCH_BYTES = _BATCH_HEADER.size + _CAPACITY * _RANGE.size
_STATUS = struct.Struct("=QQII")
_SEQ = struct.Struct("=Q")

_BATCH_STILL_ISOLATED = 1 << 0

# include/uapi/asm-generic/ioctl.h: direction, size, type, number
_IOC_WRITE, _IOC_READ = 1, 2
_IOC_ACK = _IOC_WRITE << 30 | _SEQ.size << 16 | ord("h") << 8 | 1
_IOC_REPORT_NOW = ord("h") << 8 | 2
_IOC_RETURN = _IOC_WRITE << 30 | _SEQ.size << 16 | ord("h") << 8 | 4
_IOC_STATUS = _IOC_READ << 30 | _STATUS.size << 16 | ord("h") << 8 | 3

# How long the module shows a batch that nobody reads.
_UNREAD_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the module shows at a time; its ranges are isolated."""

    seq: int
    still_isolated: bool
    ranges: list[Range]


def parse_batch(data: bytes) -> Batch:
    """A struct hintfleet_batch.

    :raises Refused: it is none: the module is of another version than this agent.
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
    """Takes free chunks through the kernel's page reporting.

    A batch of the module that is larger than what `isolate` may return is handed
    out in parts, and acknowledged when all of them were released. An allowance (policy
    pressure) is thus rounded up to batches, of 64 MiB or, with pages merged to order 10,
    128 MiB: a batch given back half hinted would be shown again whole.
    """

    name = IsolatorKind.KMOD
    must_be_polled = True  # a chunk that is freed only makes a pass due, in 2 s

    def __init__(self, device: str = DEVICE) -> None:
        """Nothing is opened before `start`."""
        self._device = device
        self._fd = -1
        self._seq = 0
        self._rest: list[Range] = []
        self._parts_out = 0
        self._all_hinted = True
        self._acknowledged = Event()
        self._closing = -1
        self._watcher: Thread | None = None

    def start(self, wake: Callable[[], None]) -> RangeSet:
        self._fd = _open(self._device)
        left = EMPTY
        batch = self._read()
        if batch is not None:
            self._seq = batch.seq
            if batch.still_isolated:
                self._rest = batch.ranges
                left = self._take(len(self._rest), sum(r.page_count for r in self._rest))
            else:
                self._answer(_IOC_RETURN)  # it may not be hinted before there is a Welcome
        self._closing = os.eventfd(0)
        self._watcher = Thread(target=self._watch, args=(wake,), name="kmod", daemon=True)
        self._watcher.start()
        return left

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        if not self._rest and not self._parts_out:
            batch = self._read()
            if batch is not None:
                self._seq, self._rest = batch.seq, batch.ranges
        return self._take(max_ranges, max_pages)

    def _take(self, max_ranges: int, max_pages: int) -> RangeSet:
        taken: list[Range] = []
        while self._rest and len(taken) < max_ranges and max_pages > 0:
            pfn, page_count = self._rest.pop()
            part = min(page_count, max_pages)
            taken.append(Range(pfn, part))
            max_pages -= part
            if part < page_count:
                self._rest.append(Range(pfn + part, page_count - part))
        self._parts_out += bool(taken)
        return RangeSet(taken)

    @property
    def unfinished(self) -> bool:
        return bool(self._rest)

    def enough(self) -> bool:
        return True  # the kernel has collected a batch

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        self._parts_out -= bool(ranges)
        self._all_hinted &= hinted
        if ranges and not self._rest and not self._parts_out:
            self._answer(_IOC_ACK if self._all_hinted else _IOC_RETURN)

    def _answer(self, how: int) -> None:
        fcntl.ioctl(self._fd, how, _SEQ.pack(self._seq))
        self._all_hinted = True
        self._acknowledged.set()

    def report_now(self, *, thorough: bool) -> None:  # noqa: ARG002 - the kernel knows
        fcntl.ioctl(self._fd, _IOC_REPORT_NOW)

    def used_again(self, ranges: RangeSet) -> None:
        """Nothing to do: the allocator itself notices what is freed."""

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "the kernel does not say since when a chunk is free: no policy cold with kmod",
                hint="policy eager or pressure",
            )

    def idle(self) -> bool:
        """Whether no pass is queued or running, and none is due.

        The kernel sets one due when a chunk is freed; that, not a scan, is what
        makes a look at an idle guest cheap.
        """
        status = fcntl.ioctl(self._fd, _IOC_STATUS, bytes(_STATUS.size))
        _batch_count, _page_count, state, _order = _STATUS.unpack(status)
        return not state

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

    def _watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` once for each batch."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._closing, select.POLLIN)
        while not any(fd == self._closing for fd, _ in poll.poll()):
            wake()
            # The device stays readable until somebody reads, who may not want to
            # now; then the module takes the batch back, and shows another later.
            self._acknowledged.wait(_UNREAD_TIMEOUT_S)
            self._acknowledged.clear()

    def _read(self) -> Batch | None:
        try:
            data = os.read(self._fd, _BATCH_BYTES)
        except BlockingIOError:
            return None
        return parse_batch(data)


def _open(device: str) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hints = {
            errno.ENOENT: "load the module: insmod hintfleet_kmod.ko (deploy/kmod); if it does not"
            " load, dmesg says why: most often the guest's balloon has free page reporting on",
            errno.EBUSY: "another guest agent has it open; stop that one first",
            errno.EACCES: "run the guest agent as root",
            errno.EPERM: "let it use the device: DeviceAllow=/dev/hintfleet rw in its unit",
        }
        raise Refused(
            f"cannot isolate: opening {device}: {error.strerror}",
            hint=hints.get(error.errno or 0, ""),
        ) from error

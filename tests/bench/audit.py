"""Measure the CPU time of an audit that finds 64 MiB of refaulted memory in a RAM file, beside
other ways to find the same memory. Then measure audits of guests that also have much absent memory,
or many single absent pages, beside an audit of a guest that has no other absent memory."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from unittest import mock

from hintfleet.ranges import RangeSet
from hintfleet.units import GIB, MIB, PAGE_BYTES
from host_agent.memory.page_map import PageMap
from host_agent.memory.ram import GuestRam, Segment
from tests.bench.report import Figure, side_by_side

_ROUNDS = 11
_BACK = PageMap([(4096, 64 * MIB // PAGE_BYTES)])
_LARGE_BYTES = 64 * GIB
_CUT_UP_PAGES = 65536


def run() -> Iterator[Figure]:
    """Yield the CPU time of an audit / of another way to find the same memory (two figures), and of
    an audit of one guest / of another guest (two figures)."""
    yield _beside("walk through the whole file with SEEK_DATA and SEEK_HOLE, in C", _walk_all)
    yield _beside("the same without cachestat (before Linux 6.5)", _uncounted)
    yield _within(f"with {_LARGE_BYTES // GIB} GiB absent / with 64 MiB absent", _large())
    yield _within(f"with {_CUT_UP_PAGES // 2} single absent pages elsewhere / with none", _cut_up())


Look = Callable[["_Guest"], None]


class _Guest:
    """A RAM file in which only the `touched` pages are resident. By the books the `absent` pages
    are absent; the pages of `_BACK` are in both sets, so an audit must find them."""

    def __init__(self, size_bytes: int, absent: PageMap, touched: RangeSet) -> None:
        fd = os.memfd_create("audit")
        os.truncate(fd, size_bytes)
        for pfn, page_count in touched:
            for at in range(pfn, pfn + page_count, 256):
                count = min(256, pfn + page_count - at)
                os.pwrite(fd, bytes(count * PAGE_BYTES), at * PAGE_BYTES)
        segment = Segment(pfn=0, page_count=size_bytes // PAGE_BYTES, fd=fd, offset_bytes=0)
        self.ram = GuestRam([segment])
        self.absent = absent
        self.fd, self.size_bytes = fd, size_bytes

    def look(self) -> None:
        """Look for the pages of `_BACK` as the host agent would: begin where they are, because
        memory came back there last."""
        found = self.ram.look(self.absent, 4096, _BACK.page_count)
        assert found.resident.page_count == _BACK.page_count


def _took_s(look: Callable[[], None]) -> float:
    started_s = time.thread_time()
    look()
    return time.thread_time() - started_s


def _busy() -> _Guest:
    """Return a guest of 1 GiB, all of it resident, `_BACK` absent by the books."""
    return _Guest(GIB, _BACK, RangeSet([(0, GIB // PAGE_BYTES)]))


def _beside(name: str, other: Look) -> Figure:
    guest = _busy()
    pairs = [
        (_took_s(guest.look) * 1e3, _took_s(lambda: other(guest)) * 1e3) for _ in range(_ROUNDS)
    ]
    guest.ram.close()
    return side_by_side(f"audit, 64 MiB back in 1 GiB in use / {name}", "ms", pairs)


def _walk_all(guest: _Guest) -> None:
    lseek = ctypes.CDLL(None).lseek
    lseek.restype, lseek.argtypes = ctypes.c_long, (ctypes.c_int, ctypes.c_long, ctypes.c_int)
    at = 0
    while 0 <= at < guest.size_bytes:
        at = lseek(guest.fd, at, os.SEEK_DATA)
        if at >= 0:
            at = lseek(guest.fd, at, os.SEEK_HOLE)


def _uncounted(guest: _Guest) -> None:
    with mock.patch("host_agent.memory.ram.cached_bytes", return_value=0):
        guest.look()


def _within(name: str, guest: _Guest) -> Figure:
    """Return the CPU time of an audit of `guest`, beside that of a guest in which only `_BACK` is
    absent by the books, and only `_BACK` is resident. Close the files of both guests."""
    small = _Guest(GIB, _BACK, _BACK.ranges())
    pairs = [(_took_s(guest.look) * 1e3, _took_s(small.look) * 1e3) for _ in range(_ROUNDS)]
    for each in (guest, small):
        each.ram.close()
    return side_by_side(f"audit, 64 MiB back, {name}", "ms", pairs)


def _large() -> _Guest:
    return _Guest(_LARGE_BYTES, PageMap([(0, _LARGE_BYTES // PAGE_BYTES)]), _BACK.ranges())


def _cut_up() -> _Guest:
    far = 131072
    pieces = RangeSet((far + 2 * n, 1) for n in range(_CUT_UP_PAGES // 2))
    whole = RangeSet([(far, _CUT_UP_PAGES)])
    return _Guest(GIB, _BACK | PageMap(pieces), _BACK.ranges() | (whole - pieces))

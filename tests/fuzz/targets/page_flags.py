"""The reader of /proc/kpageflags, which finds the chunks whose first page has a flag, compared with
a slow one. The file may end after any entry, also within a span that is read."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from guest_agent.memory.kernel import PageFlags
from tests.fuzz.source import Source
from tests.fuzz.target import Target, TryInput

_ENTRY = struct.Struct("=Q")


def _flagged(entries: list[int], bit: int, spans: list[range], order: int) -> list[int]:
    """Return the first pfns of all aligned chunks that lie wholly in a span and have the flag in
    their first page, span by span."""
    return [
        pfn
        for span in spans
        for pfn in span
        if pfn % (1 << order) == 0
        and pfn + (1 << order) <= span.stop
        and pfn < len(entries)
        and entries[pfn] >> bit & 1
    ]


@contextmanager
def _opened() -> Iterator[TryInput]:
    fd = os.memfd_create("kpageflags")
    flags = PageFlags(f"/proc/self/fd/{fd}")

    def try_input(data: bytes) -> None:
        source = Source(data)
        order, bit = source.number() % 5, source.number() % 64
        spans = [
            range(start, start + source.number(2) % 2048)
            for start in (source.number() for _ in range(source.number() % 4))
        ]
        times = 1 + source.number() % 16
        entries = [byte * 0x0101010101010101 for byte in source.take(256)] * times
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"".join(map(_ENTRY.pack, entries)), 0)
        assert flags.chunks_with(bit, spans, order) == _flagged(entries, bit, spans, order)

    try:
        yield try_input
    finally:
        flags.close()
        os.close(fd)


TARGET = Target(
    opened=_opened,
    seeds=(
        bytes([2, 17, 2, 0, 64, 0, 70, 60, 0, 1]) + b"\xff\0" * 60,
        bytes([0, 0, 1, 1, 255, 7, 15]) + b"\1\0\1" * 60,
    ),
    max_bytes=280,
    quick_runs=3_000,
)

"""Which free chunks have not been hinted yet: both designs of the 2019 thread.

`BitmapTracker` (Lal): a bit per chunk, set by the allocator's free hook. The bits lie
in words of 64 chunks, one word for each 128 MiB section at order 9, and only words
with a set bit exist: a hole in a sparse zone costs nothing, a section that is
hot-added needs no resize, and a scan walks what changed and nothing else. (v11 kept
one flat bitmap over the zone's whole span, and its scan read every word of it.)

`ReportedTracker` (Duyck): no memory of its own; the allocator marks free blocks that
were reported, and a pass takes those that are not.
"""

from __future__ import annotations

import sys
import threading
from typing import Protocol

from guest_agent.memory.buddy import BuddyAllocator, Zone

_WORD_BITS = 64


class Tracker(Protocol):
    """Free chunks of one zone that wait to be hinted."""

    @property
    def waiting_count(self) -> int:
        """Chunks that wait."""

    def mark(self, pfn: int) -> None:
        """The chunk at `pfn` is free and has not been hinted. Called by the free hook."""

    def take(self, max_chunks: int) -> list[int]:
        """Up to so many waiting chunks, by their first pfns, to be isolated at once."""

    def memory_bytes(self) -> int:
        """Memory that the tracker holds."""


class ReportedTracker:
    """Duyck's: what waits is what the allocator has not marked."""

    def __init__(self, allocator: BuddyAllocator, zone: Zone) -> None:
        self._allocator = allocator
        self._zone = zone

    @property
    def waiting_count(self) -> int:
        return self._zone.unreported_page_count >> self._allocator.chunk_order

    def mark(self, pfn: int) -> None:
        """Nothing to do: a block that is freed bears no mark."""

    def take(self, max_chunks: int) -> list[int]:
        return self._allocator.unreported_chunks(self._zone, max_chunks)

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._zone.unreported)


class BitmapTracker:
    """Lal's: a bit for each chunk that waits.

    The free hook and the scan run on different threads; a lock of the tracker's own
    makes each of them whole.
    """

    def __init__(self, chunk_order: int) -> None:
        self._chunk_order = chunk_order
        self._words: dict[int, int] = {}
        self._lock = threading.Lock()
        self.waiting_count = 0

    def mark(self, pfn: int) -> None:
        index, bit = divmod(pfn >> self._chunk_order, _WORD_BITS)
        with self._lock:
            word = self._words.get(index, 0)
            if not word >> bit & 1:
                self._words[index] = word | 1 << bit
                self.waiting_count += 1

    def take(self, max_chunks: int) -> list[int]:
        """Clear up to `max_chunks` bits and return the pfns of their chunks.

        The section that was marked first comes first; within a section, low pfns
        do. A bit is cleared before its chunk is looked at, so that a chunk that is
        freed again meanwhile sets it again: nothing is left behind a scan.
        """
        taken: list[int] = []
        with self._lock:
            while len(taken) < max_chunks and self._words:
                index, word = next(iter(self._words.items()))
                while word and len(taken) < max_chunks:
                    lowest = word & -word
                    word ^= lowest
                    taken.append(
                        (index * _WORD_BITS + lowest.bit_length() - 1) << self._chunk_order
                    )
                if word:
                    self._words[index] = word
                else:
                    del self._words[index]
            self.waiting_count -= len(taken)
        return taken

    def memory_bytes(self) -> int:
        with self._lock:
            numbers = [n for entry in self._words.items() for n in entry]
            return sys.getsizeof(self._words) + sum(map(sys.getsizeof, numbers))

"""Trackers: each finds the free chunks of one zone of an embedded guest that wait to be hinted.

Both designs of free page hinting that the kernel's mailing list discussed in 2019 are here: that of
Nitesh Narayan Lal, and that of Alexander Duyck.

`BitmapTracker` (Lal) has a bit per chunk, which the allocator's free hook sets. A word holds the
bits of 64 chunks (128 MiB at order 9), and only words with a set bit are stored. So a hole in a
sparse zone costs nothing, hot-added memory needs no resize, and a scan reads only words with chunks
that wait.
(Version 11 of Lal's patches had one flat bitmap over the zone's whole span, and its scan read every
word.)

`ReportedTracker` (Duyck) stores nothing itself: the allocator marks free blocks that were
reported, and the tracker returns the free chunks without the mark.
"""

from __future__ import annotations

import sys
import threading
from typing import Protocol

from guest_agent.memory.buddy import BuddyAllocator, Zone

_WORD_BITS = 64


class Tracker(Protocol):
    """The chunks of one zone that were freed and wait to be hinted; some may be in use again."""

    @property
    def waiting_count(self) -> int:
        """How many chunks wait, with those that may be in use again (see `take`)."""

    def mark(self, pfn: int) -> None:
        """Note that the chunk at `pfn` is free and not hinted.

        Called by the free hook, and for chunks that were released but must be hinted again.
        """

    def take(self, max_chunks: int) -> list[int]:
        """Return up to `max_chunks` waiting chunks, each as its first pfn.

        Some of them may be in use again: the caller skips those. It must isolate the others at
        once, because a tracker may forget all chunks that it returns.
        """

    def memory_bytes(self) -> int:
        """Return the size of the data from which `take` picks chunks."""


class ReportedTracker:
    """Duyck's tracker: a free chunk waits if the allocator has not marked it as reported."""

    def __init__(self, allocator: BuddyAllocator, zone: Zone) -> None:
        self._allocator = allocator
        self._zone = zone

    @property
    def waiting_count(self) -> int:
        return len(self._zone.unreported)

    def mark(self, pfn: int) -> None:
        """Do nothing: a freed block has no reported mark, so its chunks wait already."""

    def take(self, max_chunks: int) -> list[int]:
        return self._allocator.unreported_chunks(self._zone, max_chunks)

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._zone.unreported)


class BitmapTracker:
    """The tracker of Lal's patches: a bit for each chunk that waits to be hinted."""

    def __init__(self, chunk_order: int) -> None:
        self._chunk_order = chunk_order
        self._words: dict[int, int] = {}
        self._set_count = 0
        # The free hook runs in the workload's thread, the scan on the event loop.
        self._lock = threading.Lock()

    @property
    def waiting_count(self) -> int:
        return self._set_count

    def mark(self, pfn: int) -> None:
        with self._lock:
            index, bit = divmod(pfn >> self._chunk_order, _WORD_BITS)
            word = self._words.get(index, 0)
            self._set_count += not word >> bit & 1
            self._words[index] = word | 1 << bit

    def take(self, max_chunks: int) -> list[int]:
        """Take waiting chunks word by word (64 chunks): the word that was stored first comes first,
        and in each word the lowest pfns."""
        # The bits are cleared here, before the caller isolates the chunks. If a chunk is used and
        # freed in between, the free hook sets its bit again, and the next scan finds the chunk.
        taken: list[int] = []
        with self._lock:
            while len(taken) < max_chunks and self._words:
                index, word = next(iter(self._words.items()))
                while word and len(taken) < max_chunks:
                    lowest = word & -word
                    word ^= lowest
                    chunk = index * _WORD_BITS + lowest.bit_length() - 1
                    taken.append(chunk << self._chunk_order)
                if word:
                    self._words[index] = word
                else:
                    del self._words[index]
            self._set_count -= len(taken)
        return taken

    def memory_bytes(self) -> int:
        with self._lock:
            entries = list(self._words.items())
        return sys.getsizeof(self._words) + sum(
            sys.getsizeof(number) for entry in entries for number in entry
        )

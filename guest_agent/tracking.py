"""Trackers: each finds the free chunks of one zone of an embedded guest that wait to be hinted.

Both designs of free page hinting that the kernel's mailing list discussed in 2019 are here (see
README.md).

`BitmapTracker` (Lal) has a bit per chunk. The allocator's free hook sets it; under policy cold it
is set later, when the chunk has been free for long enough. A word holds the bits of 64 chunks
(128 MiB at order 9), and only words with a set bit are stored. So a hole in a sparse zone costs
nothing, hot-added memory needs no resize, and a scan reads only words with chunks that wait.
(Version 11 of Lal's patches had one flat bitmap over the zone's whole span, and its scan read every
word.)

`ReportedTracker` (Duyck) stores nothing itself: the allocator marks free blocks that were
reported, and the tracker returns the free chunks without the mark.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from guest_agent.memory.buddy import BuddyAllocator, Zone
from hintfleet.errors import Refused

_WORD_BITS = 64


class Tracker(Protocol):
    """The free chunks of one zone that wait to be hinted."""

    @property
    def waiting_count(self) -> int:
        """How many chunks wait."""

    def mark(self, pfn: int) -> None:
        """Note that the chunk at `pfn` is free and not hinted.

        Called by the free hook, and for chunks that were released but must be hinted again.
        """

    def take(self, max_chunks: int) -> list[int]:
        """Take up to `max_chunks` waiting chunks; return their first pfns.

        The caller must isolate them at once, and skip those that are in use again.
        """

    def only_cold(self, after_s: float) -> None:
        """From now on, a freed chunk waits to be hinted only when it has been free for `after_s`
        seconds (0: at once).

        :raises hintfleet.errors.Refused: this tracker does not know how long a chunk has been
            free.
        """

    def memory_bytes(self) -> int:
        """Return the size of the tracker's own data."""


class ReportedTracker:
    """Duyck's tracker: a free chunk waits if the allocator has not marked it as reported."""

    def __init__(self, allocator: BuddyAllocator, zone: Zone) -> None:
        self._allocator = allocator
        self._zone = zone

    @property
    def waiting_count(self) -> int:
        return self._zone.unreported_page_count >> self._allocator.chunk_order

    def mark(self, pfn: int) -> None:
        """Do nothing: a freed block has no reported mark, so its chunks wait already."""

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "tracker reported cannot follow policy cold: the mark does not tell how long a"
                " chunk has been free",
                hint="tracker: bitmap",
            )

    def take(self, max_chunks: int) -> list[int]:
        return self._allocator.unreported_chunks(self._zone, max_chunks)

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._zone.unreported)


class BitmapTracker:
    """Lal's tracker: a bit for each chunk that waits.

    Under `only_cold`, a freed chunk is first kept with the time when it was freed, and gets its
    bit when it has been free for long enough.
    """

    def __init__(self, chunk_order: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._chunk_order = chunk_order
        self._clock = clock
        self._words: dict[int, int] = {}
        self._set_count = 0
        self._cold_after_s = 0.0
        self._not_yet_cold: dict[int, float] = {}
        # The free hook runs in the workload's thread, the scan on the event loop.
        self._lock = threading.Lock()

    @property
    def waiting_count(self) -> int:
        with self._lock:
            self._mark_cold()
            return self._set_count

    def mark(self, pfn: int) -> None:
        with self._lock:
            if self._cold_after_s:
                self._clear(pfn)  # a bit of an earlier free would count it as cold
                # Remove the pfn first, so that it is inserted at the end: the dict must stay sorted
                # by time.
                self._not_yet_cold.pop(pfn, None)
                self._not_yet_cold[pfn] = self._clock()
            else:
                self._set(pfn)

    def take(self, max_chunks: int) -> list[int]:
        """Take waiting chunks word by word (64 chunks): the word that was stored first comes first,
        and in each word the lowest pfns."""
        # The bits are cleared here, before the caller isolates the chunks. If a chunk is used and
        # freed in between, the free hook sets its bit again, and the next scan finds the chunk.
        taken: list[int] = []
        with self._lock:
            self._mark_cold()
            while len(taken) < max_chunks and self._words:
                index, word = next(iter(self._words.items()))
                while word and len(taken) < max_chunks:
                    lowest = word & -word
                    word ^= lowest
                    chunk = index * _WORD_BITS + lowest.bit_length() - 1
                    taken.append(chunk << self._chunk_order)
                self._put_word(index, word)
            self._set_count -= len(taken)
        return taken

    def only_cold(self, after_s: float) -> None:
        with self._lock:
            self._cold_after_s = after_s

    def memory_bytes(self) -> int:
        with self._lock:
            entries = [*self._words.items(), *self._not_yet_cold.items()]
            return (
                sys.getsizeof(self._words)
                + sys.getsizeof(self._not_yet_cold)
                + sum(sys.getsizeof(number) for entry in entries for number in entry)
            )

    def _mark_cold(self) -> None:
        """Set the bits of chunks freed `_cold_after_s` ago or earlier; some may be in use again."""
        freed_before_s = self._clock() - self._cold_after_s
        while self._not_yet_cold:
            pfn, freed_at_s = next(iter(self._not_yet_cold.items()))
            if freed_at_s > freed_before_s:
                return
            del self._not_yet_cold[pfn]
            self._set(pfn)

    def _set(self, pfn: int) -> None:
        index, bit = divmod(pfn >> self._chunk_order, _WORD_BITS)
        word = self._words.get(index, 0)
        self._set_count += not word >> bit & 1
        self._words[index] = word | 1 << bit

    def _clear(self, pfn: int) -> None:
        index, bit = divmod(pfn >> self._chunk_order, _WORD_BITS)
        word = self._words.get(index, 0)
        self._set_count -= word >> bit & 1
        self._put_word(index, word & ~(1 << bit))

    def _put_word(self, index: int, word: int) -> None:
        if word:
            self._words[index] = word
        else:
            self._words.pop(index, None)

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
import time
from collections.abc import Callable
from typing import Protocol

from guest_agent.memory.buddy import BuddyAllocator, Zone
from hintfleet.errors import Refused

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

    def only_cold(self, after_s: float) -> None:
        """From now on, a chunk waits only once it has been free for `after_s`; 0 for at once.

        :raises hintfleet.errors.Refused: this tracker does not know since when.
        """

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

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "the reported mark does not say since when a chunk is free: no policy cold",
                hint="tracker: bitmap",
            )

    def take(self, max_chunks: int) -> list[int]:
        return self._allocator.unreported_chunks(self._zone, max_chunks)

    def memory_bytes(self) -> int:
        return sys.getsizeof(self._zone.unreported)


class BitmapTracker:
    """Lal's: a bit for each chunk that waits.

    Under `only_cold`, a chunk that is freed is first kept with its date, and gets its
    bit when it has been free for long enough. The free hook and the scan run on
    different threads; a lock of the tracker's own makes each of them whole.
    """

    def __init__(self, chunk_order: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._chunk_order = chunk_order
        self._clock = clock
        self._words: dict[int, int] = {}
        self._set_count = 0
        self._cold_after_s = 0.0
        self._young: dict[int, float] = {}
        self._lock = threading.Lock()

    @property
    def waiting_count(self) -> int:
        with self._lock:
            self._ripen()
            return self._set_count

    def mark(self, pfn: int) -> None:
        with self._lock:
            if self._cold_after_s:
                self._clear(pfn)  # it was used since that bit was set
                self._young.pop(pfn, None)  # to go to the end: the dict is sorted by date
                self._young[pfn] = self._clock()
            else:
                self._set(pfn)

    def take(self, max_chunks: int) -> list[int]:
        """The section that was marked first comes first; within a section, low pfns do.

        A bit is cleared before its chunk is looked at, so that a chunk that is freed
        again meanwhile sets it again: nothing is left behind a scan.
        """
        taken: list[int] = []
        with self._lock:
            self._ripen()
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
            entries = [*self._words.items(), *self._young.items()]
            return (
                sys.getsizeof(self._words)
                + sys.getsizeof(self._young)
                + sum(sys.getsizeof(number) for entry in entries for number in entry)
            )

    def _ripen(self) -> None:
        """Set the bits of chunks that have been free for long enough."""
        ripe_at_s = self._clock() - self._cold_after_s
        while self._young:
            pfn, freed_at_s = next(iter(self._young.items()))
            if freed_at_s > ripe_at_s:
                return
            del self._young[pfn]
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

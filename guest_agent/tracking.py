"""Which free chunks have not been hinted yet: the bitmap of the 2019 thread.

A bit per chunk, per zone. The bits lie in words of 64 chunks, one word for each
128 MiB section at order 9, and only words with a set bit exist: a hole in a
sparse zone costs nothing, a section that is hot-added needs no resize, and a scan
walks what changed and nothing else. (v11 kept one flat bitmap over the zone's
whole span, and its scan read every word of it.)

The free hook and the scan run on different threads; a lock of the tracker's own
makes each of them whole.
"""

from __future__ import annotations

import sys
import threading

_WORD_BITS = 64


class BitmapTracker:
    """Free chunks of one zone that wait to be hinted."""

    name = "bitmap"

    def __init__(self, chunk_order: int) -> None:
        self._chunk_order = chunk_order
        self._words: dict[int, int] = {}
        self._lock = threading.Lock()
        self.waiting_count = 0
        """Set bits: chunks that wait."""

    def mark(self, pfn: int) -> None:
        """The chunk at `pfn` has become free."""
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
        """Memory that the bitmap holds."""
        with self._lock:
            numbers = [n for entry in self._words.items() for n in entry]
            return sys.getsizeof(self._words) + sum(map(sys.getsizeof, numbers))

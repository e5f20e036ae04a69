"""The memory that a workload holds, and the proof that it kept its contents.

Each block is filled with a seeded pattern, and compared with it before it is freed, and whenever
all blocks are checked. A page that differs is counted as wrong. For example, a page that the host
has punched although it was in use reads as zeros.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from guest_agent.workload.source import EXTENT_BYTES, Source
from hintfleet.units import PAGE_BYTES

_PATTERN_SEED = 0x68696E74
_OFFSET_STEP_BYTES = 8


class Pattern:
    """A pattern of EXTENT_BYTES bytes for each key; no two pages of a pattern are equal.

    The patterns of all keys are parts of the same pseudo-random bytes; the key decides at which
    offset its pattern begins. Two keys have the same offset in one of 262,144 cases. So a page that
    holds zeros, older content or the content of another page is almost surely noticed.
    """

    def __init__(self, zero_percent: int = 0) -> None:
        """:param zero_percent: the part of each page that is zeros."""
        random_bytes = random.Random(_PATTERN_SEED).randbytes(2 * EXTENT_BYTES)
        if zero_percent:
            kept = PAGE_BYTES * (100 - zero_percent) // 100
            pages = range(0, len(random_bytes), PAGE_BYTES)
            parts = (random_bytes[at : at + kept].ljust(PAGE_BYTES, b"\0") for at in pages)
            random_bytes = b"".join(parts)
        self._random_bytes = memoryview(random_bytes)

    def of(self, key: int, size_bytes: int = EXTENT_BYTES) -> memoryview:
        """Return the first `size_bytes` bytes of the pattern of a key."""
        # Most keys are consecutive: without this hash, their patterns would begin 8 bytes apart.
        mixed = (key * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 32
        start = mixed % (EXTENT_BYTES // _OFFSET_STEP_BYTES) * _OFFSET_STEP_BYTES
        return self._random_bytes[start : start + size_bytes]


class _Block(NamedTuple):
    size_bytes: int
    key: int
    zero_percent: int


class Holding:
    """The blocks that a workload holds.

    :ivar held_bytes: their size in all.
    :ivar verified_pages: how many pages were compared so far.
    :ivar wrong_pages: how many of them did not have the contents that were written.
    """

    def __init__(self, source: Source) -> None:
        self.held_bytes = 0
        self.verified_pages = 0
        self.wrong_pages = 0
        self._source = source
        self._patterns: dict[int, Pattern] = {}  # by the percentage of zeros
        self._blocks: dict[int, _Block] = {}  # by address
        self._next_key = 1

    def take(self, size_bytes: int, seed: int, zero_percent: int = 0) -> int:
        """Allocate a block, write its pattern to it, and return its address.

        :param zero_percent: the part of each page that is zeros.
        :raises MemoryError: no such block can be had, even after waiting for memory.
        """
        at = self._source.allocate(size_bytes)
        key = seed << 32 ^ self._next_key
        self._next_key += 1
        block = _Block(size_bytes, key, zero_percent)
        self._source.write(at, self._content(block))
        self._blocks[at] = block
        self.held_bytes += size_bytes
        return at

    def copy(self, source_at: int, target_at: int) -> None:
        """Copy one extent to another one, which has the pattern of the first from then on."""
        self._source.copy(source_at, target_at)
        self._blocks[target_at] = self._blocks[source_at]

    def free(self, at: int) -> None:
        """Check a block, and free it."""
        self.check(at)
        size_bytes = self._blocks.pop(at).size_bytes
        self.held_bytes -= size_bytes
        self._source.free(at, size_bytes)

    def free_some(self, size_bytes: int, seed: int) -> None:
        """Check and free whole blocks, `size_bytes` at most: the same share of those of each size.

        Extents are picked at random, by the seed. Of smaller blocks, evenly spaced ones are picked:
        so the blocks that stay lie between the freed ones, and keep them from merging into chunks.
        """
        held_bytes = self.held_bytes
        by_size: dict[int, list[int]] = {}
        for at, block in self._blocks.items():
            by_size.setdefault(block.size_bytes, []).append(at)
        for block_bytes, blocks in by_size.items():
            wanted = min(len(blocks) * size_bytes // held_bytes, len(blocks))
            if block_bytes == EXTENT_BYTES:
                picked = random.Random(seed).sample(blocks, wanted)
            else:
                picked = _evenly_spaced(sorted(blocks), wanted)
            for at in picked:
                self.free(at)

    def check_all(self) -> None:
        """Compare all blocks with their patterns; count the pages compared, and the wrong ones."""
        for at in self._blocks:
            self.check(at)

    def check(self, at: int) -> None:
        """Compare one block with its pattern."""
        block = self._blocks[at]
        size_bytes = block.size_bytes
        expected = self._content(block).tobytes()
        found = self._source.read(at, size_bytes)
        self.verified_pages += size_bytes // PAGE_BYTES
        if found != expected:
            self.wrong_pages += sum(
                found[i : i + PAGE_BYTES] != expected[i : i + PAGE_BYTES]
                for i in range(0, size_bytes, PAGE_BYTES)
            )

    def _content(self, block: _Block) -> memoryview:
        pattern = self._patterns.get(block.zero_percent)
        if pattern is None:
            pattern = self._patterns[block.zero_percent] = Pattern(block.zero_percent)
        return pattern.of(block.key, block.size_bytes)


def _evenly_spaced(blocks: list[int], wanted: int) -> list[int]:
    count = len(blocks)
    return [at for i, at in enumerate(blocks) if (i + 1) * wanted // count > i * wanted // count]

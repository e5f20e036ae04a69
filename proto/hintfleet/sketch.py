"""Sketches: many values from 1 to 2^53 in few integers, for percentiles that are right to 1 %.

A sketch counts how many values fall into each bucket; each bucket's bounds are 2 % apart. Sketches
of different guests are merged by adding their counts, and nothing is lost by that. This is DDSketch
(Masson, Rim, Lee: VLDB 2019). We do not use its library, because guests would need it as well, and
this file has all that we need of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

RELATIVE_ERROR = 0.01
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GROWTH = math.log(_GROWTH)

LARGEST_VALUE = 1 << 53
MOST_BUCKETS = math.ceil(math.log(LARGEST_VALUE) / _LOG_GROWTH) + 1


def bucket_of(value: float) -> int:
    """Return the bucket of a value: 0 for 1 and less, the last one for LARGEST_VALUE and more."""
    return math.ceil(math.log(min(max(value, 1), LARGEST_VALUE)) / _LOG_GROWTH)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """How many values are in each bucket.

    :ivar first_bucket: the bucket of the first count.
    :ivar counts: how many values are in this bucket, in the next one, and so on.
    """

    first_bucket: int = 0
    counts: tuple[int, ...] = ()

    @staticmethod
    def of(counts: Mapping[int, int]) -> Sketch:
        """Return the sketch with these counts, by bucket."""
        if not counts:
            return Sketch()
        first = min(counts)
        dense = (counts.get(bucket, 0) for bucket in range(first, max(counts) + 1))
        return Sketch(first_bucket=first, counts=tuple(dense))

    @staticmethod
    def merged(sketches: Iterable[Sketch]) -> Sketch:
        """Return the sketch of all values of these sketches."""
        counts: Counter[int] = Counter()
        for sketch in sketches:
            counts.update(dict(enumerate(sketch.counts, sketch.first_bucket)))
        return Sketch.of(counts)

    @property
    def total(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Return, right to 1 %, the value that this share of all values does not exceed; None
        without values."""
        # `cumulative` yields the same quotients, so both agree, whatever rounding does.
        total = self.total
        return next((value for value, seen in self._seen() if seen / total >= share), None)

    def cumulative(self) -> Iterator[tuple[float, float]]:
        """Yield values, right to 1 % and growing, each with the share of all values that do not
        exceed it; nothing without values."""
        total = self.total
        for value, seen in self._seen():
            yield value, seen / total

    def _seen(self) -> Iterator[tuple[float, int]]:
        """Yield a value for each bucket that has any, and how many are in it and those before."""
        seen = 0
        for bucket, count in enumerate(self.counts, self.first_bucket):
            seen += count
            if count:
                # The point that is at most RELATIVE_ERROR away from any value in the bucket.
                yield 2 * _GROWTH**bucket / (_GROWTH + 1), seen

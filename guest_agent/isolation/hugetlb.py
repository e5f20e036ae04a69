"""Isolation on a stock kernel: free chunks are moved into the hugetlb pool.

A pass moves free chunks, in steps, until it has found as many as there are to gain, and
leaves a reserve. It keeps every one of them until the last was acknowledged: if it released
as it went, it would meet the same chunks again and again, for the kernel hands out first
what was freed last. For that reason, too, the first steps find most of what was freed since
the last pass, and the guest has the rest of its free memory all the time. Each step moves
twice as many as the one before, and begins when all of that was acknowledged: how much is
held grows with the proof that the host answers.

With `init_on_alloc` the kernel zeroes each chunk as it moves it: absent memory becomes
resident until it is punched. Such a pass moves 32 chunks at a time, or a 64th of the
memory if that is more and fits a batch, and hints all of them: no more than that is
ever resident for that reason alone. (Each step looks at all page flags: steps of a
fixed size would cost the square of the memory.) As it may have to zero all that is free, it has
to gain an eighth of that unless it is asked for, and an allowance (policy pressure)
that covers less than all that is free gains nothing there.

Tracking: what the host acknowledged is absent until the host says that it was used
again. An agent that starts waits for the host to say what is resident; all else that is
free is absent. A pass is worth its while when more chunks are free than are absent; what the
last pass could not have (the reserve) does not count. After a pass, four times as long as
it took goes by before the next, half a second at the most, unless one is asked for.

A guest that takes memory while a pass holds some of it may run out of it. So no pass begins
while free memory falls, unless it is asked for; and once the guest has used half of the
reserve, nothing more is handed out, and the pass ends with what is in flight.

When the host is lost in the middle of a pass, what is in the pool stays there until
the next Welcome: the kernel does not let us choose which pages leave the pool, so
those of a batch in flight cannot be told from the others. What bounds this: passes
are short (a few tenths of a second for 700 MiB) and hold little more than was
freed lately, one that has no batch in flight ends by itself, and the reserve (a sixteenth of
the memory and the low watermarks) stays free for the guest, besides all that its kernel can
reclaim.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol

from guest_agent.isolation.hugetlb_pool import CHUNK_ORDER, CHUNK_PAGES
from hintfleet.errors import Refused, TransientError
from hintfleet.logs import fields
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import IsolatorKind

_ZEROING_STEP_CHUNKS = 32
_ZEROING_GAIN_SHARE = 8
_REST_FACTOR = 4
_LONGEST_REST_S = 0.5
_FIRST_STEP_SHARE = 16
_GROWTH_SHARE = 4

_log = logging.getLogger("hintfleet.guest.hugetlb")


class Pool(Protocol):
    """The guest's kernel, as far as passes need it; see HugetlbPool."""

    def open(self) -> RangeSet: ...
    def free_chunks(self) -> int: ...
    def free_ranges(self) -> RangeSet: ...
    def reserve_chunks(self) -> int: ...
    def grow(self, chunks: int) -> int: ...
    def chunks(self) -> RangeSet: ...
    def empty(self) -> None: ...
    def close(self) -> None: ...


class HugetlbIsolator:
    """Pulls: grows the pool when it is asked for chunks and enough of them are free."""

    name = IsolatorKind.HUGETLB
    unfinished = False
    must_be_polled = True  # the kernel tells nobody of what is freed

    def __init__(
        self,
        pool: Pool,
        *,
        threshold_chunks: int,
        zeroing: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is changed before `start`.

        :param threshold_chunks: what an unasked pass has to gain.
        :param zeroing: whether the kernel writes to chunks as it moves them.
        """
        self._pool = pool
        self._threshold_chunks = threshold_chunks
        self._zeroing = zeroing
        self._held = EMPTY
        """In the pool now, by this pass."""
        self._to_hint: list[int] = []
        """First pfns of chunks of `_held` that are to be handed out."""
        self._out_pages = 0
        self._absent = EMPTY
        """Chunks that the host has dealt with, or that it did not name as resident at first, and
        that were not used since."""
        self._told_resident = False
        """Whether the host has said what is resident at all."""
        self._reserve_chunks = 0
        self._to_move_chunks = 0
        """How many more this pass may move."""
        self._to_find_chunks = 0
        """How many more that are not absent this pass is to find."""
        self._step_chunks = 0
        """How many the next step moves, unless it zeroes them."""
        self._withheld_chunks = 0
        """Beyond the reserve, free chunks that this pass did not move: the kernel would not,
        or there was nothing more to find."""
        self._left_behind_chunks = 0
        """Free and not absent, but the last pass could not have them."""
        self._asked = False
        self._last_free_chunks = 0
        self._growing = False
        """The guest took memory between the last two looks."""
        self._shared = False
        """Somebody else uses the pool, and this was said."""
        self._clock = clock
        self._began_at_s = self._rest_until_s = 0.0

    def start(self, wake: Callable[[], None]) -> RangeSet:
        del wake  # the kernel calls nobody; the core's period is what drives passes
        self._began_at_s = self._clock()  # what a dead agent left is a pass of ours now
        self._held = self._pool.open()
        self._out_pages = self._held.page_count
        self._reserve_chunks = self._pool.reserve_chunks()
        return self._held

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        count = min(max_ranges, max_pages // CHUNK_PAGES)  # a chunk makes at most one range
        if not count:
            return EMPTY
        if self._held and self._pool.free_chunks() < self._reserve_chunks // 2:
            self._break_off()
        if not self._to_hint:
            self._fill(count)
        taken, self._to_hint = self._to_hint[:count], self._to_hint[count:]
        self._out_pages += len(taken) * CHUNK_PAGES
        return RangeSet((pfn, CHUNK_PAGES) for pfn in taken)

    def enough(self) -> bool:
        return True  # what is in the pool is to be hinted

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """They stay in the pool until the pass ends; nobody else can have them there."""
        self._out_pages -= ranges.page_count
        if hinted:
            self._absent |= ranges
        else:
            self._absent -= ranges
            self._to_hint += _first_pfns(ranges)

    def report_now(self, *, thorough: bool) -> None:
        """Have the next `isolate` begin a pass, however little it may gain; with zeroing,
        if it gains the threshold."""
        self._asked |= thorough

    def idle(self) -> bool:
        """Costs one small read."""
        if self._out_pages:
            return True  # the pass goes on with the acks
        if self._held:
            self._end_pass()
        free = self._pool.free_chunks()
        self._growing = self._last_free_chunks - free > self._reserve_chunks // _GROWTH_SHARE
        self._last_free_chunks = free
        return not self._gain(free)

    def used_again(self, ranges: RangeSet) -> None:
        if not self._told_resident:
            self._absent |= self._pool.free_ranges()
            self._left_behind_chunks = 0
            self._told_resident = True
        self._absent -= ranges.whole_chunks(CHUNK_ORDER)

    def only_cold(self, after_s: float) -> None:
        if after_s:
            raise Refused(
                "the kernel does not say since when a chunk is free: no policy cold with hugetlb",
                hint="policy eager or pressure",
            )

    def tracker_bytes(self) -> int:
        return sum(
            sys.getsizeof(r) + sys.getsizeof(r.pfn) + sys.getsizeof(r.page_count)
            for r in self._absent
        )

    def close(self) -> None:
        self._pool.close()

    # A pass

    def _fill(self, wanted_chunks: int) -> None:
        """Begin a pass or go on with one, until there is something to hint; end it if there
        is nothing more. Nothing is done before all that is out was acknowledged."""
        if self._out_pages or not (self._held or self._begins()):
            return
        while not self._to_hint and self._to_move_chunks > 0:
            self._move(min(self._step(wanted_chunks), self._to_move_chunks))
        if not self._to_hint:
            self._end_pass()

    def _step(self, wanted_chunks: int) -> int:
        """How many to move next."""
        if self._zeroing:
            # The reserve is a sixteenth of the memory.
            return min(max(_ZEROING_STEP_CHUNKS, self._reserve_chunks // 4), wanted_chunks)
        step = self._step_chunks
        self._step_chunks *= 2
        return step

    def _begins(self) -> bool:
        gain = self._gain(self._pool.free_chunks())
        self._asked = False
        if gain:
            self._began_at_s = self._clock()
            self._reserve_chunks = self._pool.reserve_chunks()
            self._to_move_chunks = self._room_chunks()
            self._to_find_chunks = gain
            self._step_chunks = -(-self._to_move_chunks // _FIRST_STEP_SHARE)
            self._withheld_chunks = 0
        return gain > 0

    def _break_off(self) -> None:
        """The guest needs its memory: what was not handed out yet has to wait."""
        if self._zeroing:
            self._absent -= RangeSet((pfn, CHUNK_PAGES) for pfn in self._to_hint)
        self._to_hint, self._to_move_chunks = [], 0

    def _move(self, chunks: int) -> None:
        """Move so many into the pool, if they are still free."""
        self._to_move_chunks -= chunks
        chunks = min(chunks, max(0, self._room_chunks()))
        try:
            came = self._pool.grow(chunks)
            new = self._pool.chunks() - self._held
        except TransientError as error:
            self._to_move_chunks = 0  # what is held is as it was, and the next pass tries again
            if not self._shared:
                _log.warning("hugetlb pool cannot be used now", extra=fields(reason=error.message))
            self._shared = True
            return
        if self._shared:
            _log.info("hugetlb pool is free again")
        self._shared = False
        self._withheld_chunks += chunks - came
        self._held |= new
        found = new - self._absent
        self._to_hint = _first_pfns(new if self._zeroing else found)
        self._to_find_chunks -= _chunk_count(found)
        if self._to_find_chunks <= 0:
            self._withheld_chunks += self._to_move_chunks
            self._to_move_chunks = 0

    def _end_pass(self) -> None:
        free = min(self._pool.free_chunks(), self._reserve_chunks + self._withheld_chunks)
        # Of the absent chunks outside the pool, those that are free are among `free`.
        self._left_behind_chunks = free - _chunk_count(self._absent - self._held)
        self._to_hint, self._held, self._to_move_chunks = [], EMPTY, 0
        self._last_free_chunks = 0  # what was in the pool was not free
        self._pool.empty()
        now_s = self._clock()
        rest_s = min(_REST_FACTOR * (now_s - self._began_at_s), _LONGEST_REST_S)
        self._rest_until_s = now_s + rest_s

    # What a pass would gain

    def _room_chunks(self) -> int:
        return self._pool.free_chunks() - self._reserve_chunks

    def _gain(self, free_chunks: int) -> int:
        """How many chunks a pass has to find; 0 if it is not worth its while now."""
        room = free_chunks - self._reserve_chunks
        rests = self._growing or self._clock() < self._rest_until_s
        if room <= 0 or not self._told_resident or (rests and not self._asked):
            return 0
        thorough = self._asked and not self._zeroing
        left_behind = 0 if thorough else self._left_behind_chunks
        gain = free_chunks - _chunk_count(self._absent) - left_behind
        least = 1 if thorough else self._threshold_chunks
        if self._zeroing and not self._asked:
            # A guest is never quite still: to zero all that is free for a chunk or two would
            # go on for ever.
            least = max(least, room // _ZEROING_GAIN_SHARE)
        return gain if gain >= least else 0


def _chunk_count(ranges: RangeSet) -> int:
    return ranges.page_count // CHUNK_PAGES


def _first_pfns(ranges: RangeSet) -> list[int]:
    return [pfn for start, pages in ranges for pfn in range(start, start + pages, CHUNK_PAGES)]

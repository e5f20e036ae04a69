"""Isolation on a stock kernel: free chunks are moved into the hugetlb pool.

A pass moves free chunks into the pool, step by step. Free chunks whose memory is not known to be
absent on the host are new. A pass counts the new chunks when it begins, without those that it
could not have or that are to be held back. It moves no more chunks when it has found that many, or
when only the reserve is left, and ends when all that it has hinted is acknowledged. All moved
chunks stay in the pool until the pass ends. Each step moves up to twice as many chunks as the step
before (not with `init_on_alloc`), and begins only when the host has acknowledged all that the step
before has hinted.

With `init_on_alloc` the kernel zeroes each chunk that it moves: absent memory becomes resident
until it is punched. Such a pass moves 32 chunks at a time, or about a 64th of the memory if that is
more, but never more than a batch may hold (nor, while memory is held back, than it has yet to
find), and hints all of them. So at most one step of memory is resident for this reason. The pass
may have to zero all free memory, so it begins only if the new chunks are at least an eighth of the
free memory beyond the reserve; if it was requested, `threshold_chunks` are enough. An allowance
(policy pressure) smaller than all free memory may gain nothing: it is spent on absent chunks, too.

Tracking: a chunk that the host has acknowledged counts as absent until the host reports a refault.
A new agent begins no pass before the host has reported which memory is resident; all other free
chunks then count as absent. A pass is worthwhile when enough new chunks are free. Chunks that a
pass could not have (the reserve, and what the kernel refused) do not count, except for a requested
pass without `init_on_alloc`. After a pass, the next one waits four times as long as the pass took,
half a second at the most, unless one is requested.

A guest that allocates while a pass holds memory may run out of memory. So no pass begins
while free memory falls fast, unless one is requested. When the guest has used half of the reserve,
no more chunks are hinted, and the pass ends when all batches in flight are acknowledged.

If the host is lost while a batch is in flight, the pool stays as it is until the next Welcome;
if no batch is in flight, the pass ends by itself. The kernel does not let us choose which pages
leave the pool, so the pool cannot keep only the chunks of a batch in flight. The effect on the
guest is bounded: a pass is short (a few tenths of a second for 700 MiB); without `init_on_alloc` it
holds at most about three times the memory that was freed lately, or a sixteenth of the movable
memory if that is more; and the reserve (a sixteenth of the memory
and the low watermarks) stays free for the guest, besides what its kernel can reclaim.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol

from guest_agent.isolation.hugetlb_pool import CHUNK_ORDER, CHUNK_PAGES
from guest_agent.isolation.isolator import HeldBack, UsedPages, nothing_held_back
from guest_agent.procfs import mem_used_pages
from hintfleet.errors import TransientError
from hintfleet.logs import fields
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.settings import IsolatorKind

_ZEROING_STEP_CHUNKS = 32
_ZEROING_GAIN_SHARE = 8
# The pause after a pass is this many times as long as the pass. Without pauses, a workload ran four
# times as long. With a factor of 10, memory was hinted later, and that cost more than it saved.
_REST_FACTOR = 4
# The longest pause after a pass, so that memory that is freed meanwhile does not wait long.
_LONGEST_REST_S = 0.5
# The first step moves this part (1/16) of the movable chunks. It finds most new chunks, because the
# kernel allocates first what was freed last.
_FIRST_STEP_SHARE = 16
_GROWTH_RESERVE_SHARE = 4

_log = logging.getLogger("hintfleet.guest.hugetlb")


class Pool(Protocol):
    """The methods of `HugetlbPool` that the isolator calls; they are documented there."""

    def open(self) -> RangeSet: ...
    def free_chunks(self) -> int: ...
    def free_ranges(self) -> RangeSet: ...
    def reserve_chunks(self) -> int: ...
    def grow(self, chunks: int) -> int: ...
    def chunks(self) -> RangeSet: ...
    def empty(self) -> None: ...
    def close(self) -> None: ...


class HugetlbIsolator:
    """Isolates on request: `isolate` grows the pool if enough free chunks may be resident."""

    name = IsolatorKind.HUGETLB
    unfinished = False
    must_be_polled = True  # a stock kernel notifies nobody when memory is freed

    def __init__(
        self,
        pool: Pool,
        *,
        threshold_chunks: int,
        zeroing: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; the kernel's pool is not touched before `start`.

        :param threshold_chunks: no pass begins by itself while fewer free chunks than this may be
            resident on the host; with `zeroing`, not even a requested pass.
        :param zeroing: whether the kernel writes to chunks as it moves them.
        """
        self._pool = pool
        self._threshold_chunks = threshold_chunks
        self._zeroing = zeroing
        self._in_pool = EMPTY
        """Chunks that this pass has moved into the pool."""
        self._to_hint: list[int] = []
        """First pfns of the chunks of `_in_pool` that `isolate` has yet to return."""
        self._in_flight_pages = 0
        self._absent = EMPTY
        """Chunks without memory on the host: acknowledged, or free and not in the host's first list
        of what is resident, and not used since."""
        self._resident_known = False
        """Whether the host has sent its first list of what is resident."""
        self._reserve_chunks = 0
        self._to_move_chunks = 0
        """How many more chunks this pass may move."""
        self._to_find_chunks = 0
        """How many more chunks that are not absent this pass has to find."""
        self._step_chunks = 0
        """How many chunks the next step moves; not used with zeroing."""
        self._unmoved_chunks = 0
        """Free chunks beyond the reserve that this pass did not move: the kernel refused, or
        the pass had found all new chunks."""
        self._unobtainable_chunks = 0
        """Chunks that are free and not absent, but that the last pass which did not find all that
        it looked for could not have; fewer if a pass since then left fewer."""
        self._pass_requested = False
        self._last_free_chunks = 0
        self._guest_grows = False
        """Whether the guest allocated more than a quarter of the reserve between the last two
        polls, without a pass in between."""
        self._held_back: HeldBack = nothing_held_back
        self._held_back_chunks = 0
        """How many free chunks, not known to be absent, no pass looks for."""
        self._conflict_logged = False
        """Whether another user of the pool was logged and has not gone since."""
        self._clock = clock
        self._began_at_s = self._rest_until_s = 0.0

    def start(self, wake: Callable[[], None], held_back: HeldBack = nothing_held_back) -> RangeSet:
        del wake  # not called: a stock kernel notifies nobody, so this agent polls
        self._held_back = held_back
        self._began_at_s = self._clock()  # chunks left by a dead agent count as a pass
        self._in_pool = self._pool.open()
        self._in_flight_pages = self._in_pool.page_count
        self._reserve_chunks = self._pool.reserve_chunks()
        return self._in_pool

    def isolate(self, max_ranges: int, max_pages: int) -> RangeSet:
        count = min(max_ranges, max_pages // CHUNK_PAGES)  # a chunk makes at most one range
        if not count:
            return EMPTY
        if self._in_pool and self._pool.free_chunks() < self._reserve_chunks // 2:
            self._stop_moving()
        if not self._to_hint:
            self._advance_pass(count)
        taken, self._to_hint = self._to_hint[:count], self._to_hint[count:]
        self._in_flight_pages += len(taken) * CHUNK_PAGES
        return RangeSet((pfn, CHUNK_PAGES) for pfn in taken)

    def used_pages(self) -> UsedPages:
        used = mem_used_pages() - self._in_pool.page_count
        return UsedPages(used, used)

    def enough_ready(self) -> bool:
        return True  # whatever is in the pool is missing in the guest: hint it at once

    def release(self, ranges: RangeSet, *, hinted: bool) -> None:
        """Note the host's answer; the chunks stay in the pool until the pass ends.

        If a chunk left the pool before that, the next step would get the same chunk again: the
        kernel allocates first what was freed last.
        """
        self._in_flight_pages -= ranges.page_count
        if hinted:
            self._absent |= ranges
        else:
            self._absent -= ranges
            self._to_hint += _first_pfns(ranges)

    def report_now(self, *, thorough: bool) -> None:
        """If `thorough`, request a pass; else do nothing.

        A requested pass begins even in the pause after a pass or while free memory falls fast,
        and even for a single new chunk (with zeroing, for `threshold_chunks`).
        """
        self._pass_requested |= thorough

    def idle(self) -> bool:
        """Return whether a batch is in flight or no pass would begin now.

        This call ends a pass that has nothing in flight: all its chunks leave the pool. Without
        such a pass, it costs one small read at most.
        """
        if self._in_flight_pages:
            return True  # the next ack continues the pass
        if self._in_pool:
            self._end_pass()
        free = self._pool.free_chunks()
        self._guest_grows = (
            self._last_free_chunks - free > self._reserve_chunks // _GROWTH_RESERVE_SHARE
        )
        self._last_free_chunks = free
        return not self._gain(free)

    def refaulted(self, ranges: RangeSet) -> None:
        if not self._resident_known:
            self._absent |= self._pool.free_ranges()
            self._unobtainable_chunks = 0
            self._resident_known = True
        self._absent -= ranges.whole_chunks(CHUNK_ORDER)

    def isolated_pages(self) -> int:
        return self._in_pool.page_count

    def tracker_bytes(self) -> int:
        return sum(
            sys.getsizeof(r) + sys.getsizeof(r.pfn) + sys.getsizeof(r.page_count)
            for r in self._absent
        )

    def close(self) -> None:
        self._pool.close()

    # Methods that carry out a pass

    def _advance_pass(self, wanted_chunks: int) -> None:
        """Continue the pass, or begin one if it is worthwhile, until it has found chunks to hint;
        end it if it finds none.

        Do nothing while a batch is in flight: a silent host must not make the guest lose more
        and more of its free memory.
        """
        if self._in_flight_pages or not (self._in_pool or self._begin_pass()):
            return
        while not self._to_hint and self._to_move_chunks > 0:
            self._move_to_pool(min(self._next_step_chunks(wanted_chunks), self._to_move_chunks))
        if not self._to_hint:
            self._end_pass()

    def _next_step_chunks(self, wanted_chunks: int) -> int:
        """Return how many chunks the next step moves; without zeroing, double the step after it."""
        if self._zeroing:
            # A quarter of the reserve is a 64th of the memory. The steps are larger in a larger
            # guest because each step reads the flags of all chunks: with steps of a fixed size, the
            # cost of a pass would grow with the square of the memory.
            most = self._to_find_chunks if self._held_back_chunks else wanted_chunks
            return min(max(_ZEROING_STEP_CHUNKS, self._reserve_chunks // 4), wanted_chunks, most)
        step = self._step_chunks
        self._step_chunks *= 2
        return step

    def _begin_pass(self) -> bool:
        gain = self._gain(self._pool.free_chunks())
        self._pass_requested = False
        if gain:
            self._began_at_s = self._clock()
            self._reserve_chunks = self._pool.reserve_chunks()
            self._to_move_chunks = self._movable_chunks()
            self._to_find_chunks = gain
            self._step_chunks = -(-self._to_move_chunks // _FIRST_STEP_SHARE)
            self._unmoved_chunks = 0
        return gain > 0

    def _stop_moving(self) -> None:
        """Move and hint no more chunks in this pass, because the guest needs its memory."""
        if self._zeroing:
            # The kernel zeroed the chunks of `_to_hint` as it moved them, so they are resident, not
            # absent.
            self._absent -= RangeSet((pfn, CHUNK_PAGES) for pfn in self._to_hint)
        self._to_hint, self._to_move_chunks = [], 0

    def _move_to_pool(self, chunks: int) -> None:
        """Move up to `chunks` free chunks into the pool, and choose which of them to hint.

        If somebody else uses the pool, this pass moves no more chunks.
        """
        self._to_move_chunks -= chunks
        chunks = min(chunks, max(0, self._movable_chunks()))
        try:
            moved = self._pool.grow(chunks)
            new = self._pool.chunks() - self._in_pool
        except TransientError as error:
            self._to_move_chunks = 0  # this pass moves no more; the next pass tries again
            if not self._conflict_logged:
                _log.warning("hugetlb pool cannot be used now", extra=fields(reason=error.message))
            self._conflict_logged = True
            return
        if self._conflict_logged:
            _log.info("hugetlb pool is free again")
        self._conflict_logged = False
        self._unmoved_chunks += chunks - moved
        self._in_pool |= new
        found = new - self._absent
        self._to_hint = _first_pfns(new if self._zeroing else found)
        if self._held_back_chunks and not self._zeroing:
            # The other found chunks are held back: they leave the pool at the end of the pass
            # without having been hinted.
            del self._to_hint[self._to_find_chunks :]
        self._to_find_chunks -= _chunk_count(found)
        if self._to_find_chunks <= 0:
            self._unmoved_chunks += self._to_move_chunks
            self._to_move_chunks = 0

    def _end_pass(self) -> None:
        free = min(self._pool.free_chunks(), self._reserve_chunks + self._unmoved_chunks)
        # Subtract the absent chunks outside the pool, which `free` includes.
        left = free - _chunk_count(self._absent - self._in_pool)
        if self._to_find_chunks <= 0:
            # This pass found all that it looked for, and did not try to move the rest. Among the
            # rest are chunks that were held back, and chunks that were reported as resident or
            # freed during the pass: the next pass may have them all.
            left = min(left - self._held_back_chunks, self._unobtainable_chunks)
        self._unobtainable_chunks = max(0, left)
        self._to_hint, self._in_pool, self._to_move_chunks = [], EMPTY, 0
        # The next `idle` must not compare its count of free chunks with one from before the pass.
        self._last_free_chunks = 0
        self._pool.empty()
        now_s = self._clock()
        rest_s = min(_REST_FACTOR * (now_s - self._began_at_s), _LONGEST_REST_S)
        self._rest_until_s = now_s + rest_s

    # How much a pass would gain

    def _movable_chunks(self) -> int:
        return self._pool.free_chunks() - self._reserve_chunks

    def _gain(self, free_chunks: int) -> int:
        """Return how many maybe resident chunks a pass would look for; 0 if they are too few, or if
        no pass may begin now."""
        self._held_back_chunks = self._held_back(self.used_pages()).free // CHUNK_PAGES
        movable = free_chunks - self._reserve_chunks
        must_rest = self._guest_grows or self._clock() < self._rest_until_s
        if movable <= 0 or not self._resident_known or (must_rest and not self._pass_requested):
            return 0
        thorough = self._pass_requested and not self._zeroing
        unobtainable = 0 if thorough else self._unobtainable_chunks
        gain = free_chunks - _chunk_count(self._absent)
        gain -= max(unobtainable, self._held_back_chunks)  # unobtainable ones count as held back
        least = 1 if thorough else self._threshold_chunks
        if self._zeroing and not self._pass_requested:
            # Every guest uses a chunk or two now and then. Without this bound, passes for so few
            # chunks could zero all free memory, over and over.
            least = max(least, movable // _ZEROING_GAIN_SHARE)
        return gain if gain >= least else 0


def _chunk_count(ranges: RangeSet) -> int:
    return ranges.page_count // CHUNK_PAGES


def _first_pfns(ranges: RangeSet) -> list[int]:
    return [pfn for start, pages in ranges for pfn in range(start, start + pages, CHUNK_PAGES)]

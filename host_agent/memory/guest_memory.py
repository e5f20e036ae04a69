"""The RAM of one guest and its books: what is entered, and who may look or punch when.

System calls that block on the RAM file run in worker threads. Meanwhile `lock` is held, so that
an audit and a punch never overlap. A method that says "Locked" expects its caller to hold it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from hintfleet.errors import GuestLost, Refused
from hintfleet.ranges import EMPTY, RangeSet
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.memory.audit_pace import CALM_PAGES
from host_agent.memory.cache_count import CAN_COUNT
from host_agent.memory.fence import FenceClosed
from host_agent.memory.ledger import Books, Ledger
from host_agent.memory.page_map import NO_PAGES, PageMap
from host_agent.memory.ram import GuestRam, Look, Segment
from host_agent.memory.reclaim import Outcome, reclaim, skip

_T = TypeVar("_T")

# A batch within these bounds (at most 1 MiB to drop, in few runs) takes less time than to hand
# it to a thread and back.
_LIGHT_RANGES, _LIGHT_SPAN_PAGES, _LIGHT_PAGES = 8, 8192, 256
# A look that need not be in full ends after this time, for batches wait for it. The next look
# goes on from there.
_SLICE_S = 0.01


class GuestMemory:
    """The RAM and books of a guest. They are open from `started` or `recovered` to `closed`."""

    def __init__(
        self,
        name: str,
        *,
        others_reclaim: bool,
        changed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        """:param name: the guest's name, for messages.
        :param others_reclaim: whether memory may leave the RAM without a batch (peers).
        :param changed: called after each change of the books.
        :param lost: called with the reason when the RAM cannot be looked at any more. It is
            closed then.
        """
        self.lock = asyncio.Lock()
        self.refaults_to_tell = NO_PAGES
        """Absent memory that was found in use again, and that the guest was not told of yet."""
        self.plugged_pages = EMPTY
        """Memory that was plugged and is in the books."""
        self._forgotten = NO_PAGES
        """Pages that were unplugged: a guest that remembers which of its memory is absent must
        forget them."""
        self.last_ledger = host_pb2.Ledger()
        """The books as `books_now` last returned them."""
        self._ledger_is_current = False
        self._name = name
        self._others_reclaim = others_reclaim
        self._changed = changed
        self._lost = lost
        self._open: tuple[GuestRam, Ledger] | None = None
        self._audited_bytes = 0
        """How much was resident at the last look."""
        self._look_from_pfn = 0
        self._moved_from_bytes = 0
        """How much was resident when `has_moved` last returned true."""

    # Life

    def started(self, ram: GuestRam) -> None:
        """Open the RAM and the books of a new guest."""
        self._open = ram, Ledger(ram.page_map, others_reclaim=self._others_reclaim)

    def recovered(self, ram: GuestRam, books: Books) -> None:
        """Open the RAM of a guest that an earlier host agent made, with its books. Blocks."""
        ledger = Ledger.restored(ram.page_map, books, others_reclaim=self._others_reclaim)
        resident = ram.resident(ram.page_map)
        ledger.recover(resident)
        # Nobody stored which refaults the guest was told of: tell it all that is resident.
        self.refaults_to_tell = resident
        self._open = ram, ledger

    def closed(self) -> None:
        """Stop using the RAM; `last_ledger` stays as it is."""
        self._open = None

    def books(self) -> Books | None:
        """Return all that is in the books, to be stored; None if they are not open."""
        return self._open[1].books() if self._open else None

    def tell_all_again(self) -> None:
        """Plan to tell the guest all that it uses: earlier messages may have been lost."""
        if self._open:
            ram, ledger = self._open
            self.refaults_to_tell = (ram.page_map - ledger.absent_pages) | self._forgotten

    def _opened(self) -> tuple[GuestRam, Ledger]:
        if self._open is None:
            raise GuestLost(f"guest {self._name} does not run")
        return self._open

    async def run_locked(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do work that says "Locked", and return what it returns."""
        async with self.lock:
            return await work

    # Batches

    async def reclaim(self, hinted: RangeSet) -> Outcome:
        """Reclaim what a batch has hinted, whose turn has just come. Locked."""
        if self._open is None:
            return skip(hinted, hinting_pb2.GUEST_GONE)
        ram, ledger = self._open
        # The permit is taken here, not in the thread: before that begins, the guest may be stopped
        # and go on, and a permit of then would be valid again.
        permit = ram.permit()
        try:
            if self._is_light(hinted):
                return reclaim(ram, hinted, ledger.absent_pages, permit)
            return await asyncio.to_thread(reclaim, ram, hinted, ledger.absent_pages, permit)
        except OSError:  # `reclaim` handles a failed punch: not even a look was possible
            return skip(hinted, hinting_pb2.HOST_ERROR)

    def _is_light(self, hinted: RangeSet) -> bool:
        """Return whether a batch takes less time than handing it to a thread: it has few runs
        to look at and, by the books and the sum, few pages to drop."""
        ram, ledger = self._opened()
        if len(hinted) > _LIGHT_RANGES or hinted.page_count > _LIGHT_SPAN_PAGES:
            return False
        pages = PageMap(hinted)
        absent = pages & ledger.absent_pages
        unseen = max(0, ledger.unseen_pages(ram.resident_bytes()))
        return (
            not self._others_reclaim
            # Without cachestat, a look at few pages may walk through all that is resident
            # behind them (SEEK_HOLE).
            and (CAN_COUNT or not unseen)
            and absent.run_count <= _LIGHT_RANGES
            and pages.page_count - absent.page_count + unseen <= _LIGHT_PAGES
        )

    def post(self, hinted: RangeSet, outcome: Outcome, wire_bytes: int) -> None:
        """Enter the outcome of a batch into the books."""
        if self._open:
            self._open[1].post(hinted, outcome, wire_bytes)
            self._books_changed()
        # The guest must not hear after the ack that it uses what the batch has just reclaimed.
        self.refaults_to_tell -= outcome.reclaimed

    # Hotplug

    def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Enter memory that the driver has plugged; return its pages. Locked.

        :raises GuestLost: the guest does not run.
        """
        ram, ledger = self._opened()
        before = ram.pages
        ram.plug(segments)
        pages = ram.pages - before
        ledger.plugged(PageMap(pages))
        self.plugged_pages |= pages
        # `unplugged` may have added these pages; now they are RAM and absent again.
        self._forgotten -= PageMap(pages)
        self.refaults_to_tell -= PageMap(pages)
        self._books_changed()
        return pages

    async def unplugged(self, pages: RangeSet) -> None:
        """Drop memory that the driver has unplugged, and remove it from the books. Locked.

        :raises GuestLost: the guest does not run.
        :raises Refused: the host's kernel did not drop it; it is still in the books.
        """
        ram, _ = self._opened()
        try:
            await asyncio.to_thread(ram.punch, pages, ram.permit())
        except FenceClosed:
            pass  # QEMU has removed the device: its memory is freed with its file
        except OSError as error:
            raise Refused(
                f"guest {self._name}: unplugged memory cannot be dropped: {error}"
            ) from error
        self.taken_out(pages)

    def taken_out(self, pages: RangeSet) -> None:
        """Remove memory that the guest does not have any more from the RAM and the books. Locked.

        :raises GuestLost: the guest does not run.
        """
        ram, ledger = self._opened()
        ram.unplug(pages)
        # A guest that remembers which of its memory is absent must forget these pages.
        self._forgotten |= PageMap(pages)
        self.refaults_to_tell |= ledger.unplugged(PageMap(pages))
        self.plugged_pages -= pages
        self._books_changed()

    # Audits

    def books_now(self) -> host_pb2.Ledger:
        """Return the books, with what is resident now. What only a look finds is as old as the
        last look. Costs one system call for each file. Copy the message: the next call changes
        the same one."""
        if self._open:
            ram, ledger = self._open
            try:
                resident_bytes = ram.resident_bytes()
            except OSError as error:
                self._look_failed(error)
                return self.last_ledger
            # Samples ask for the books of all guests again and again; most have not changed.
            if self._ledger_is_current:
                self.last_ledger.resident_bytes = resident_bytes
            else:
                self.last_ledger = ledger.as_pb2(resident_bytes)
                self._ledger_is_current = True
        return self.last_ledger

    def moved_pages(self) -> int:
        """Return how many pages a look would find, by the sum."""
        resident_bytes = self.books_now().resident_bytes
        if self._open is None:
            return 0
        # Where others reclaim, the sum says nothing about pages that came while others left.
        if self._others_reclaim:
            return abs(resident_bytes - self._audited_bytes) // PAGE_BYTES
        return self._open[1].unseen_pages(resident_bytes)

    def has_moved(self) -> bool:
        """Return whether resident memory grew or shrank by 1 MiB or more since this method last
        returned true."""
        resident_bytes = self.books_now().resident_bytes
        moved = abs(resident_bytes - self._moved_from_bytes) >= CALM_PAGES * PAGE_BYTES
        if moved:
            self._moved_from_bytes = resident_bytes
        return moved

    async def audit(self) -> host_pb2.Ledger:
        """Look at all that can have changed, and return the books. Locked."""
        if self._open:
            _, ledger = self._open
            resident_bytes = self.books_now().resident_bytes
            if self._others_reclaim or ledger.unseen_pages(resident_bytes):
                await self.look(in_full=True)
        return self.books_now()

    async def look(self, in_full: bool = False) -> float:
        """Look at the RAM for what the books cannot know, and enter it. Return the processor
        time that this took, in seconds. Locked.

        Where nobody else reclaims, the sum says how much there is to find. The look ends when it
        has found that much, or after a short time, unless it is `in_full`.
        """
        if self._open is None:
            return 0.0
        ram, ledger = self._open
        self._audited_bytes = self.books_now().resident_bytes
        unseen_pages = ledger.unseen_pages(self._audited_bytes)

        def look() -> tuple[Look, float]:
            began_s = time.thread_time()
            if in_full or self._others_reclaim:
                found = ram.look(ledger.absent_pages)
            else:
                found = ram.look(ledger.absent_pages, self._look_from_pfn, unseen_pages, _SLICE_S)
            return found, time.thread_time() - began_s

        try:
            found, took_s = await asyncio.to_thread(look)
        except OSError as error:
            self._look_failed(error)
            return 0.0
        began_s = time.thread_time()
        self._look_from_pfn = found.next_pfn
        used = ledger.audit(found.resident)
        if used or self._others_reclaim:
            self.refaults_to_tell |= used
            self._books_changed()
        return took_s + time.thread_time() - began_s

    def _look_failed(self, error: OSError) -> None:
        self.closed()
        self._lost(f"its RAM cannot be looked at: {error.strerror}")

    def _books_changed(self) -> None:
        self._ledger_is_current = False
        self._changed()

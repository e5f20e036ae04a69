"""The RAM of one guest and the books about it: what enters them, and who may look when.

What blocks (system calls on the RAM file) runs in worker threads; `alone` is held
meanwhile, so that an audit and a punch never overlap. The methods that say so are to be
called by whoever holds it.
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
from host_agent.memory.ledger import Books, Ledger
from host_agent.memory.page_map import NO_PAGES, PageMap
from host_agent.memory.ram import GuestRam, Look, Segment
from host_agent.memory.reclaim import Outcome, reclaim, skip

_T = TypeVar("_T")

_LIGHT_RANGES, _LIGHT_SPAN_PAGES, _LIGHT_PAGES = 8, 8192, 256
_SLICE_S = 0.01
"""Of a look that need not be in full: batches wait for it. The next one goes on from there."""


class GuestMemory:
    """From the moment that the guest runs; before and afterwards there is nothing to look at."""

    def __init__(
        self,
        name: str,
        *,
        others_reclaim: bool,
        changed: Callable[[], None],
        lost: Callable[[str], None],
    ) -> None:
        """:param name: the guest's, for messages.
        :param others_reclaim: whether memory may leave the RAM without a batch.
        :param changed: called when anything was entered in the books.
        :param lost: told why when the RAM cannot be looked at any more; then it is closed.
        """
        self.alone = asyncio.Lock()
        self.used_again = NO_PAGES
        """What the guest has not been told: absent memory that was found in use."""
        self.plugged_pages = EMPTY
        """Memory that was plugged and is in the books."""
        self.last_ledger = host_pb2.Ledger()
        """The books as they were last made out."""
        self._made_out = False
        self._name = name
        self._others_reclaim = others_reclaim
        self._changed = changed
        self._lost = lost
        self._open: tuple[GuestRam, Ledger] | None = None
        self._audited_bytes = 0
        """How much was resident at the last audit."""
        self._look_from_pfn = 0
        self._stirred_bytes = 0

    # Life

    def started(self, ram: GuestRam) -> None:
        """The guest has been made: its RAM is untouched or nearly so."""
        self._open = ram, Ledger(ram.page_map, others_reclaim=self._others_reclaim)

    def recovered(self, ram: GuestRam, books: Books) -> None:
        """The guest was made by an earlier host agent, which has left these books. Blocks."""
        ledger = Ledger.restored(ram.page_map, books, others_reclaim=self._others_reclaim)
        resident = ram.resident(ram.page_map)
        ledger.recover(resident)
        # What the guest was told of that is not known: so all of it.
        self.used_again = resident
        self._open = ram, ledger

    def closed(self) -> None:
        """The RAM is looked at no more; the books stay as they were last made out."""
        self._open = None

    def books(self) -> Books | None:
        """All that is in the books, to be stored; None while there are none."""
        return self._open[1].books() if self._open else None

    def forget_what_was_told(self) -> None:
        """Count all that the guest uses as not told: nobody may have heard it."""
        if self._open:
            ram, ledger = self._open
            self.used_again = ram.page_map - ledger.absent_pages

    def _opened(self) -> tuple[GuestRam, Ledger]:
        if self._open is None:
            raise GuestLost(f"guest {self._name} does not run")
        return self._open

    async def run_alone(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do work that says "Alone", and return what it returns."""
        async with self.alone:
            return await work

    # Batches

    async def reclaim(self, hinted: RangeSet) -> Outcome:
        """Reclaim what a batch has hinted. Alone."""
        if self._open is None:
            return skip(hinted, hinting_pb2.GUEST_GONE)
        ram, ledger = self._open
        try:
            if self._is_light(hinted):
                return reclaim(ram, hinted, ledger.absent_pages)
            return await asyncio.to_thread(reclaim, ram, hinted, ledger.absent_pages)
        except OSError:  # the file does not even say what is resident
            return skip(hinted, hinting_pb2.HOST_ERROR)

    def _is_light(self, hinted: RangeSet) -> bool:
        """Whether a batch is done sooner than a thread begins with it: few runs to look at, and
        by the books and the sum few pages to drop."""
        ram, ledger = self._opened()
        if len(hinted) > _LIGHT_RANGES or hinted.page_count > _LIGHT_SPAN_PAGES:
            return False
        pages = PageMap(hinted)
        absent = pages & ledger.absent_pages
        unseen = max(0, ledger.unseen_pages(ram.resident_bytes()))
        return (
            not self._others_reclaim
            # Else a look at few pages may walk through all that is resident behind them.
            and (CAN_COUNT or not unseen)
            and absent.run_count <= _LIGHT_RANGES
            and pages.page_count - absent.page_count + unseen <= _LIGHT_PAGES
        )

    def post(self, hinted: RangeSet, outcome: Outcome, wire_bytes: int) -> None:
        """Enter what became of a batch into the books."""
        if self._open:
            self._open[1].post(hinted, outcome, wire_bytes)
            self._entered()
        # What is gone again must not be told as used after the ack.
        self.used_again -= outcome.reclaimed

    # What comes and goes

    def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Enter memory that the driver has plugged; returns which pages came. Alone.

        :raises GuestLost: the guest does not run.
        """
        ram, ledger = self._opened()
        before = ram.pages
        ram.plug(segments)
        pages = ram.pages - before
        ledger.plugged(PageMap(pages))
        self.plugged_pages |= pages
        self.used_again -= PageMap(pages)  # of what was unplugged there: it is absent again
        self._entered()
        return pages

    async def unplugged(self, pages: RangeSet) -> None:
        """Drop memory that the driver has unplugged, and take it out of the books. Alone.

        :raises GuestLost: the guest does not run.
        :raises Refused: the host's kernel would not drop it; it is in the books still.
        """
        ram, ledger = self._opened()
        try:
            await asyncio.to_thread(ram.punch, pages)
        except OSError as error:
            raise Refused(f"guest {self._name}: unplugged memory stays: {error}") from error
        ram.unplug(pages)
        # A guest that remembers what is absent must not count these any more.
        self.used_again |= ledger.unplugged(PageMap(pages))
        self.plugged_pages -= pages
        self._entered()

    # Audits

    def books_now(self) -> host_pb2.Ledger:
        """The books with what is resident now; what an audit has to find is as of the last one.
        One system call for each file. The message is the next call's, too: copy it."""
        if self._open:
            ram, ledger = self._open
            try:
                resident_bytes = ram.resident_bytes()
            except OSError as error:
                self._broken(error)
                return self.last_ledger
            if self._made_out:
                self.last_ledger.resident_bytes = resident_bytes
            else:
                self.last_ledger = ledger.as_pb2(resident_bytes)
                self._made_out = True
        return self.last_ledger

    def moved_pages(self) -> int:
        """How many pages an audit would find, by the sum."""
        resident_bytes = self.books_now().resident_bytes
        if self._open is None:
            return 0
        if self._others_reclaim:
            return abs(resident_bytes - self._audited_bytes) // PAGE_BYTES
        return self._open[1].unseen_pages(resident_bytes)

    def stirred(self) -> bool:
        """Whether 1 MiB or more of what is resident has moved since this last said so."""
        resident_bytes = self.books_now().resident_bytes
        moved = abs(resident_bytes - self._stirred_bytes) >= CALM_PAGES * PAGE_BYTES
        if moved:
            self._stirred_bytes = resident_bytes
        return moved

    async def audit(self) -> host_pb2.Ledger:
        """Look at all that can have changed, and return the books. Alone."""
        if self._open:
            _, ledger = self._open
            resident_bytes = self.books_now().resident_bytes
            if self._others_reclaim or ledger.unseen_pages(resident_bytes):
                await self.look(in_full=True)
        return self.books_now()

    async def look(self, in_full: bool = False) -> float:
        """Look at the RAM for what the books cannot know, and enter it; returns what processor
        time that took. Alone.

        Where nobody else reclaims, the sum says how much there is to find, and the look ends
        when it has found it, or after a while, unless it is to be in full.
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
            self._broken(error)
            return 0.0
        began_s = time.thread_time()
        self._look_from_pfn = found.next_pfn
        used = ledger.audit(found.resident)
        if used or self._others_reclaim:
            self.used_again |= used
            self._entered()
        return took_s + time.thread_time() - began_s

    def _broken(self, error: OSError) -> None:
        self.closed()
        self._lost(f"its RAM cannot be looked at: {error.strerror}")

    def _entered(self) -> None:
        self._made_out = False
        self._changed()

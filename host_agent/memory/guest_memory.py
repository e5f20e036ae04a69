"""The RAM of one guest and its books: what is entered into the books, and who may look or punch
when.

System calls on the RAM files that may take long run in worker threads. `lock` is held meanwhile,
so that an audit and a punch never overlap (`recovered` runs before there can be either). The caller
of a method whose docstring says "Locked" must hold `lock`.
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

# A batch within these bounds (at most 1 MiB to drop, in few runs) takes less time than handing it
# to a thread.
_LIGHT_RANGES, _LIGHT_SPAN_PAGES, _LIGHT_PAGES = 8, 8192, 256
# A look that may end early (see `look`) stops after about this processor time at the latest:
# batches wait until it ends. The next look continues where this one stopped.
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
        :param lost: called with the reason, after `closed`, when the kernel did not report what is
            resident.
        """
        self.lock = asyncio.Lock()
        self.refaults_to_tell = NO_PAGES
        """What the next Refaulted message must report: memory that was absent by the books and that
        a look found resident, and what `recovered`, `tell_all_again` and `taken_out` add."""
        self.plugged_pages = EMPTY
        """Memory that was plugged and not unplugged since, by the books."""
        self._forgotten = NO_PAGES
        """Pages that were unplugged and not plugged again. They are reported in Refaulted
        messages, because a guest that remembers which of its memory is absent must forget them."""
        self.last_ledger = host_pb2.Ledger()
        """The books as `books_now` last returned them; `closed` does not change them."""
        self._ledger_is_current = False
        self.is_freed = False
        """Whether the RAM was closed because the guest's process has ended."""
        self._name = name
        self._others_reclaim = others_reclaim
        self._changed = changed
        self._lost = lost
        self._open: tuple[GuestRam, Ledger] | None = None
        self._audited_bytes = 0
        """How much was resident when the last look began."""
        self._look_from_pfn = 0
        self._moved_from_bytes = 0
        """How much was resident when `has_moved` last returned true."""

    # Opening and closing

    def started(self, ram: GuestRam) -> None:
        """Open the RAM and the books of a new guest."""
        self._open = ram, Ledger(ram.page_map, others_reclaim=self._others_reclaim)

    def recovered(self, ram: GuestRam, books: Books) -> None:
        """Open the RAM of a guest of an earlier host agent, with the books that that agent stored.

        Blocks while it looks at all of the RAM: call it in a worker thread.
        """
        ledger = Ledger.restored(ram.page_map, books, others_reclaim=self._others_reclaim)
        resident = ram.resident(ram.page_map)
        ledger.recover(resident)
        # It is not stored which refaults were reported to the guest: report all that is resident.
        self.refaults_to_tell = resident
        self._open = ram, ledger

    async def free(self) -> None:
        """Look once more, close the books, and close the RAM, so that the kernel can free it.
        Locked."""
        self.is_freed = True
        await self.audit()
        if self._open is not None:
            ram, _ = self._open
            self.closed()
            # In a thread: it is the last descriptor, so the kernel frees all of the memory in here.
            await asyncio.to_thread(ram.close)

    def closed(self) -> None:
        """Stop using the RAM, whose files the driver closes. `last_ledger` stays as it is."""
        self._open = None

    def books(self) -> Books | None:
        """Return all that is in the books, to be stored; None if the books are not open."""
        return self._open[1].books() if self._open else None

    def tell_all_again(self) -> None:
        """Make the next Refaulted message report all memory that is resident by the books, and all
        that was unplugged, and not plugged again, since `started` or `recovered`: earlier messages
        may have been lost."""
        if self._open:
            ram, ledger = self._open
            self.refaults_to_tell = (ram.page_map - ledger.absent_pages) | self._forgotten

    def _opened(self) -> tuple[GuestRam, Ledger]:
        if self._open is None:
            raise GuestLost(f"guest {self._name} does not run")
        return self._open

    async def run_locked(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine of a "Locked" method while holding `lock`, and return its result."""
        async with self.lock:
            return await work

    # Batches

    async def reclaim(self, hinted: RangeSet) -> Outcome:
        """Reclaim the pages of a batch whose turn has just come; return the outcome, for `post`.
        Locked.

        The whole batch is skipped if the RAM is not open. It is also skipped, and the guest is
        lost, if a look at the RAM fails: a punch before that look may have dropped a part, and
        nobody knows which.
        """
        if self._open is None:
            return skip(hinted, hinting_pb2.GUEST_GONE)
        ram, ledger = self._open
        # Take the permit here, not in the thread. Before the thread begins, the guest may be
        # stopped and resumed; with a permit taken later, this old batch would run in a new epoch.
        permit = ram.permit()
        try:
            if self._is_light(hinted):
                return reclaim(ram, hinted, ledger.absent_pages, permit)
            return await asyncio.to_thread(reclaim, ram, hinted, ledger.absent_pages, permit)
        except OSError as error:  # a look failed; a failed punch is handled in reclaim.py
            self._look_failed(error)
            return skip(hinted, hinting_pb2.HOST_ERROR)

    def _is_light(self, hinted: RangeSet) -> bool:
        """Return whether a batch takes less time than handing it to a thread: it has few runs to
        look at and few pages to drop, judged by the books and by how much is resident. False where
        others reclaim: there the books do not know what is absent."""
        ram, ledger = self._opened()
        if len(hinted) > _LIGHT_RANGES or hinted.page_count > _LIGHT_SPAN_PAGES:
            return False
        pages = PageMap(hinted)
        absent = pages & ledger.absent_pages
        unseen = max(0, ledger.unseen_pages(ram.resident_bytes()))
        return (
            not self._others_reclaim
            # Without cachestat(2), a look at few pages may walk through all resident pages that
            # follow them in the file (SEEK_HOLE).
            and (CAN_COUNT or not unseen)
            and absent.run_count <= _LIGHT_RANGES
            and pages.page_count - absent.page_count + unseen <= _LIGHT_PAGES
        )

    def post(self, hinted: RangeSet, outcome: Outcome, wire_bytes: int) -> None:
        """Enter the outcome of a batch into the books, if they are open.

        :param wire_bytes: size of the batch's packed ranges.
        """
        if self._open:
            self._open[1].post(hinted, outcome, wire_bytes)
            self._books_changed()
        # A Refaulted message after the batch's ack must not report pages that the batch has
        # reclaimed.
        self.refaults_to_tell -= outcome.reclaimed

    # Hotplug

    def plugged(self, segments: Sequence[Segment]) -> RangeSet:
        """Add to the RAM and the books what the driver has plugged; return its pages. Locked.

        :raises GuestLost: the guest does not run.
        """
        ram, ledger = self._opened()
        before = ram.pages
        ram.plug(segments)
        pages = ram.pages - before
        ledger.plugged(PageMap(pages))
        self.plugged_pages |= pages
        # `taken_out` may have added the plugged pages to `_forgotten` and `refaults_to_tell`. They
        # are RAM again now, and absent, so they must not be reported as in use.
        self._forgotten -= PageMap(pages)
        self.refaults_to_tell -= PageMap(pages)
        self._books_changed()
        return pages

    async def unplugged(self, pages: RangeSet) -> None:
        """Drop memory that the driver has unplugged, and remove it from the RAM and the books.
        Locked.

        :raises GuestLost: the guest does not run.
        :raises Refused: the host's kernel did not drop all of it. All is still in the books.
        """
        ram, _ = self._opened()
        try:
            await asyncio.to_thread(ram.punch, pages, ram.permit())
        except FenceClosed:
            pass  # QEMU has removed the DIMM: `taken_out` closes its file, which frees the memory
        except OSError as error:
            raise Refused(
                f"guest {self._name}: unplugged memory cannot be dropped: {error}"
            ) from error
        self.taken_out(pages)

    def taken_out(self, pages: RangeSet) -> None:
        """Remove from the RAM and the books memory that the guest no longer has. Locked.

        :raises GuestLost: the guest does not run.
        """
        ram, ledger = self._opened()
        ram.unplug(pages)
        # A guest that remembers which of its memory is absent must forget these pages, so report
        # those that were absent.
        self._forgotten |= PageMap(pages)
        self.refaults_to_tell |= ledger.unplugged(PageMap(pages))
        self.plugged_pages -= pages
        self._books_changed()

    # Audits

    def books_now(self) -> host_pb2.Ledger:
        """Return the books, with how much is resident now. Changes that only a look finds are in
        them up to the last look. Costs one system call for each file.

        If the RAM is not open, or the system call fails (then the guest is lost), return the books
        of the last call. The caller must copy what it keeps: the next call may change the message.
        """
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
        """Return how many changed pages a look would find (under a peer, the least), judged by how
        much is resident; 0 if the RAM is not open."""
        resident_bytes = self.books_now().resident_bytes
        if self._open is None:
            return 0
        # Peers take memory without a batch: the books learn of it only from a look. So compare with
        # what was resident at the last look. Pages that came and pages that left since then cancel
        # each other out: a look finds at least the difference.
        if self._others_reclaim:
            return abs(resident_bytes - self._audited_bytes) // PAGE_BYTES
        unseen_pages = self._open[1].unseen_pages(resident_bytes)
        # If the lock is held, a batch may be running, whose punches are not in the books yet. Then
        # it proves nothing that less is resident.
        return 0 if unseen_pages < 0 and self.lock.locked() else abs(unseen_pages)

    def has_moved(self) -> bool:
        """Return whether resident memory grew or shrank by 1 MiB or more since this method last
        returned true."""
        resident_bytes = self.books_now().resident_bytes
        moved = abs(resident_bytes - self._moved_from_bytes) >= CALM_PAGES * PAGE_BYTES
        if moved:
            self._moved_from_bytes = resident_bytes
        return moved

    async def audit(self) -> host_pb2.Ledger:
        """`look` in full, unless nobody else reclaims and as much is resident as the books say.
        Return what `books_now` returns. Locked."""
        if self._open:
            _, ledger = self._open
            resident_bytes = self.books_now().resident_bytes
            if self._others_reclaim or ledger.unseen_pages(resident_bytes):
                await self.look(in_full=True)
        return self.books_now()

    async def look(self, in_full: bool = False) -> float:
        """Look at the RAM for changes that the books do not know, and enter them. Return the
        processor time that this took, in seconds. Locked.

        If less is resident than the books say, or if others reclaim, it covers all of the RAM. If
        it is `in_full`, it covers all pages that may be absent. Otherwise it may end early: when it
        has found `Ledger.unseen_pages` pages, or after _SLICE_S of processor time. If the look
        fails, the guest is lost. Then, or if the RAM is not open, return 0.
        """
        if self._open is None:
            return 0.0
        ram, ledger = self._open
        self._audited_bytes = self.books_now().resident_bytes
        unseen_pages = ledger.unseen_pages(self._audited_bytes)
        # Nobody is known to reclaim, but an operator may have moved the balloon.
        some_left = unseen_pages < 0 and not self._others_reclaim

        def look() -> tuple[Look, float]:
            began_s = time.thread_time()
            if some_left or in_full or self._others_reclaim:
                found = ram.look(ram.page_map if some_left else ledger.absent_pages)
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
        if some_left:
            ledger.left(found.resident)
        used = ledger.audit(found.resident)
        if used or some_left or self._others_reclaim:
            self.refaults_to_tell |= used
            self._books_changed()
        return took_s + time.thread_time() - began_s

    def _look_failed(self, error: OSError) -> None:
        self.closed()
        self._lost(f"its RAM cannot be looked at: {error.strerror}")

    def _books_changed(self) -> None:
        self._ledger_is_current = False
        self._changed()

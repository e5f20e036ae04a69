"""Keeps the state as new as the guests' books, off every guest's critical path.

A batch is acknowledged before its books are saved: what lies between the last save and
a death is derived from the RAM file (`Ledger.recover`). Only an epoch is saved before
its Welcome, for nothing else could tell it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any, Protocol

from hintfleet.errors import TransientError
from hintfleet.logs import fields
from host_agent.persistence.database import Database, GuestRecord

_SHORTEST_PERIOD_S = 0.1

_log = logging.getLogger("hintfleet.host.persistence")


class Saved(Protocol):
    """A guest, as far as it is kept."""

    name: str

    def record(self) -> GuestRecord | None:
        """What an adopting host agent needs to know; None while there is nothing to adopt."""


class Saver:
    """Saves guests that have changed; without a state, it does nothing."""

    def __init__(self, state: Database | None) -> None:
        self._state = state
        self._changed: dict[str, Saved] = {}
        self._something = asyncio.Event()
        # One write at a time, so that what is forgotten is not saved by an earlier one. A
        # thread that writes cannot be called back, so no caller's end ends a write.
        self._order = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()

    def changed(self, guest: Saved) -> None:
        """This guest is to be saved soon."""
        if self._state is not None:
            self._changed[guest.name] = guest
            self._something.set()

    async def run(self) -> None:
        """Save what has changed, until cancelled. Where that fails, it is said and tried again."""
        while True:
            await self._something.wait()
            try:
                await self.save_changed()
            except TransientError as error:
                _log.error("books cannot be saved", extra=fields(reason=error.message))
            await asyncio.sleep(_SHORTEST_PERIOD_S)

    async def save_changed(self) -> None:
        """Save all that has changed.

        :raises TransientError: it cannot be written; it still counts as changed.
        """
        await self._save(tuple(self._changed.values()))
        if not self._changed:
            self._something.clear()

    async def save(self, guest: Saved) -> None:
        """Save one guest now.

        :raises TransientError: it cannot be written.
        """
        await self._save((guest,))

    async def forget(self, guest: Saved) -> None:
        """A guest has ended, and nothing is to be known of it.

        :raises TransientError: it cannot be written: it will be found to have ended later.
        """
        if self._state is not None:
            await self._write(self._forget(self._state, guest.name))

    async def _forget(self, state: Database, name: str) -> None:
        self._changed.pop(name, None)
        await asyncio.to_thread(state.forget, name)

    async def _save(self, guests: Collection[Saved]) -> None:
        if self._state is not None:
            await self._write(self._save_all(self._state, guests))

    async def _save_all(self, state: Database, guests: Collection[Saved]) -> None:
        for guest in guests:
            self._changed.pop(guest.name, None)
        records = [record for guest in guests if (record := guest.record()) is not None]
        try:
            await asyncio.to_thread(state.save, records)
        except TransientError:
            self._changed |= {guest.name: guest for guest in guests}
            raise

    async def _write(self, work: Coroutine[Any, Any, None]) -> None:
        async def in_order() -> None:
            async with self._order:
                await work

        task = asyncio.create_task(in_order())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

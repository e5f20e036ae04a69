"""Saves the guests for the next host agent. Their books are saved in the background, so that no
batch waits for the disk.

The ack of a batch does not wait until the books with the batch are saved. What happened between
the last save and the end of the process is derived from the RAM file, as far as the file shows it
(`Ledger.recover`). An epoch cannot be derived, so it is saved before its Welcome is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from typing import Any, Protocol

from hintfleet.errors import TransientError
from hintfleet.logs import LogRateLimit, fields
from host_agent.persistence.database import Database, GuestRecord

# How long `run` pauses after each write: all changes of this time are stored by one write.
_MIN_PERIOD_S = 0.1

_log = logging.getLogger("hintfleet.host.persistence")


class Saved(Protocol):
    """What the saver needs of a guest."""

    name: str

    def record(self) -> GuestRecord | None:
        """Return what the next host agent needs to adopt the guest; None: store nothing."""


class Saver:
    """Saves guests that have changed. Without a state folder (--state) it does nothing."""

    def __init__(self, state: Database | None) -> None:
        self._failures = LogRateLimit()
        self._state = state
        self._changed: dict[str, Saved] = {}
        self._has_changes = asyncio.Event()
        # One write at a time: otherwise a save that began before `forget` could end after it, and
        # store the guest again. A thread that writes cannot be stopped, so a write is a task that
        # continues when its caller is cancelled.
        self._write_lock = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()

    @property
    def stores(self) -> bool:
        """Whether guests are stored for the next host agent (--state)."""
        return self._state is not None

    def changed(self, guest: Saved) -> None:
        """Note that this guest has changed; `run` saves it soon."""
        if self._state is not None:
            self._changed[guest.name] = guest
            self._has_changes.set()

    async def run(self) -> None:
        """Save guests soon after they have changed, until cancelled. If that fails, log it and try
        again."""
        while True:
            await self._has_changes.wait()
            try:
                await self.save_changed()
            except TransientError as error:
                if (left_out := self._failures.due()) is not None:
                    about = {"reason": error.message, **left_out}
                    _log.error("books cannot be saved", extra=fields(**about))
            await asyncio.sleep(_MIN_PERIOD_S)

    async def save_changed(self) -> None:
        """Save all guests that have changed.

        :raises TransientError: the state cannot be written; the guests still count as changed.
        """
        await self._save(tuple(self._changed.values()))
        if not self._changed:
            self._has_changes.clear()

    async def save(self, guest: Saved) -> None:
        """Save one guest, and return when it is written. Write nothing if `record` returns None.

        :raises TransientError: the state cannot be written; `run` will save the guest later.
        """
        await self._save((guest,))

    async def forget(self, guest: Saved) -> None:
        """Remove a guest that has ended from the state.

        :raises TransientError: the state cannot be written; the guest stays in it. The next host
            agent finds that the guest is gone, but attaches a detached domain again if it runs.
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
        # Remove the guests from `_changed` before the write, not after it: a guest that changes
        # during the write must be saved again.
        for guest in guests:
            self._changed.pop(guest.name, None)
        records = [record for guest in guests if (record := guest.record()) is not None]
        try:
            await asyncio.to_thread(state.save, records)
        except TransientError:
            # If a guest that changed meanwhile has the same name, keep that one: it may be another
            # guest by now.
            self._changed = {guest.name: guest for guest in guests} | self._changed
            self._has_changes.set()
            raise

    async def _write(self, work: Coroutine[Any, Any, None]) -> None:
        async def in_order() -> None:
            async with self._write_lock:
                await work

        task = asyncio.create_task(in_order())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.shield(task)

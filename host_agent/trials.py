"""Who watches the trials whose guests this host agent runs. A trial that nobody watches any more
ends, and its guests with it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine

from hintfleet.logs import fields

_log = logging.getLogger("hintfleet.host.registry")


class Trials:
    """Counts the open Watches of each trial, and ends the guests of trials that have none."""

    def __init__(
        self,
        end_guests: Callable[[str], Coroutine[None, None, None]],
        is_stopped: Callable[[], bool],
    ) -> None:
        """:param end_guests: ends all guests of a trial.
        :param is_stopped: whether no trial ends any more, because this host agent ends.
        """
        self._end_guests = end_guests
        self._is_stopped = is_stopped
        self._watches: Counter[str] = Counter()
        self._ending: set[asyncio.Task[None]] = set()
        self._in_grace: dict[str, asyncio.Task[None]] = {}

    def is_watched(self, trial_id: str) -> bool:
        return self._watches[trial_id] > 0

    def open_watch(self, trial_id: str) -> None:
        """Count one more open Watch of this trial. The end of the last one ends the trial."""
        _log.info("watch opened", extra=fields(trial=trial_id))
        self._watches[trial_id] += 1
        if grace := self._in_grace.pop(trial_id, None):
            grace.cancel()

    def close_watch(self, trial_id: str) -> None:
        """Count one open Watch less. If it was the last one, begin to end the trial.

        Not a coroutine: it must be done even if the stream's handler is cancelled meanwhile.
        """
        _log.info("watch closed", extra=fields(trial=trial_id))
        self._watches[trial_id] -= 1
        if not self.is_watched(trial_id):
            del self._watches[trial_id]
            self._begin_to_end(trial_id)

    def adopted(self, trial_id: str, grace_s: float) -> None:
        """Begin to end a trial of an earlier host agent if nobody watches it within `grace_s`."""

        async def end_later() -> None:
            await asyncio.sleep(grace_s)
            del self._in_grace[trial_id]
            self._begin_to_end(trial_id)

        self._in_grace[trial_id] = asyncio.create_task(end_later())

    def end_grace(self, trial_id: str) -> None:
        """Begin to end a trial that is in its time of grace; do nothing if it is not."""
        if grace := self._in_grace.pop(trial_id, None):
            grace.cancel()
            self._begin_to_end(trial_id)

    async def others_ended(self, trial_id: str) -> None:
        """Wait until all other trials have ended that nobody watches, also those in their time of
        grace. Until then, their guests have memory that the guests of this trial need, and their
        names."""
        while waiting := [
            *self._ending,
            *(task for other, task in self._in_grace.items() if other != trial_id),
        ]:
            await asyncio.wait(waiting)

    async def finish(self) -> None:
        """Wait for the trials that are ending, and for no time of grace."""
        while self._in_grace:
            self._in_grace.popitem()[1].cancel()
        await asyncio.gather(*self._ending)

    def _begin_to_end(self, trial_id: str) -> None:
        if not self._is_stopped():
            task = asyncio.create_task(self._end_guests(trial_id))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

"""Takes over the guests of an earlier host agent (--state)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from hintfleet.errors import GuestLost, Refused
from host_agent.memory.ledger import summed
from host_agent.persistence.database import GuestRecord
from host_agent.registry import Registry
from host_agent.resizing import follow_table
from host_agent.tasks import about_failure, raise_first
from host_agent.threads import in_driver_thread

_log = logging.getLogger("hintfleet.host.registry")


async def adopt(registry: Registry, records: Sequence[GuestRecord], grace_s: float) -> None:
    """Take over the guests of an earlier host agent.

    A guest that is gone, or whose log cannot be opened, stays registered as lost; if it is an
    attached one, it is attached again when its domain runs. A guest with settings that this host
    agent does not know is left alone: it is logged and not registered, and its record stays.

    :param grace_s: guests of a trial that has no open Watch after this time are ended.
    :raises Refused: a driver cannot find out whether a guest is gone, or cannot use it. No
        running guest is ended. The first error is raised, the others are logged.
    """
    adopting = [asyncio.create_task(_adopt(registry, record)) for record in records]
    if adopting:
        await asyncio.wait(adopting)
    # Not gather: it raises while other adoptions still run, and drops their errors.
    errors = [task.exception() for task in adopting]
    raise_first([record.name for record in records], errors)
    for trial_id in {record.trial_id for record in records if record.trial_id}:
        registry.trials.adopted(trial_id, grace_s)


async def _adopt(registry: Registry, record: GuestRecord) -> None:
    registry.epochs.after(record.epoch)
    try:
        guest = registry.add(record.name, record.uuid, record.trial_id, record.spec, record.token)
    except Refused as error:
        # Not raised: one guest of a later version would keep all others from being adopted.
        _log.error("guest cannot be adopted", **about_failure(record.name, error))
        return
    guest.creation = asyncio.current_task()
    driver = registry.driver_of(guest)
    try:
        running = await in_driver_thread(driver.adopt, registry.request(guest), record.handle)
    except (GuestLost, OSError) as error:  # OSError: its log cannot be opened, for example
        guest.memory.last_ledger = record.books.totals
        guest.earlier = record.earlier
        guest.lost(error.message if isinstance(error, GuestLost) else str(error))
        if guest.is_attached:
            # Kept until its domain can be attached or is removed: api/attaching_again.py.
            guest.to_attach_again = record
        return
    if guest.is_attached and not record.handle.items() <= running.handle.items():
        # Another start: the books are about other memory. (Older records have fewer items.)
        guest.earlier = summed(record.earlier, record.books.totals)
        guest.started(running)
    else:
        guest.earlier = record.earlier
        await guest.adopted(running, record.books)
    follow_table(guest)

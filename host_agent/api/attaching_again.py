"""Attaches guests again whose domain had ended and has started again; ends those whose domain does
not exist any more.

While the domain does not run, the guest is kept with closed books. When the guest is attached
again, new books begin, and `Guest.earlier` has the sums of the closed ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from hintfleet.errors import GuestLost, HintfleetError
from hintfleet.logs import fields
from host_agent.guest import Guest
from host_agent.guests.driver import Attacher
from host_agent.memory.ledger import summed
from host_agent.registry import Registry
from host_agent.threads import in_driver_thread

# How often to ask whether a domain runs. libvirt also reports starts by events, but those are lost
# while libvirtd restarts. Asking takes less than a millisecond, and is done only if a guest waits.
_PERIOD_S = 5.0
# The pause doubles with each failed attempt, up to this. Attempts fail while a domain boots: its
# kernel must bind the door's device. A domain that can never be attached is tried at this pace.
_LONGEST_PAUSE_S = 300.0

_log = logging.getLogger("hintfleet.host.guest")


async def attach_when_started(registry: Registry, driver: Attacher) -> None:
    """Until cancelled, attach each waiting guest again when its domain runs; see `_turn`."""
    pauses: dict[str, _Pause] = {}
    while True:
        await asyncio.sleep(_PERIOD_S)
        waiting = [guest for guest in registry.guests if guest.to_attach_again is not None]
        pauses = {guest.uuid: pauses.get(guest.uuid, _Pause()) for guest in waiting}
        # All guests at the same time: an attempt at a domain that boots takes many seconds.
        # A group, not gather: when this is cancelled, it waits for all of them. Each takes out the
        # door that it has plugged in.
        async with asyncio.TaskGroup() as turns:
            for guest in waiting:
                turns.create_task(_turn(registry, driver, guest, pauses[guest.uuid]))


@dataclass
class _Pause:
    """When the next attempt is due, and how long to pause if that attempt fails."""

    until_s: float = 0.0
    length_s: float = _PERIOD_S


async def _turn(registry: Registry, driver: Attacher, guest: Guest, pause: _Pause) -> None:
    """Attach a guest again if its domain runs and the pause after the last attempt is over. End it
    if its domain does not exist any more."""
    try:
        if not await in_driver_thread(driver.runs, guest.uuid):
            pause.until_s, pause.length_s = 0.0, _PERIOD_S
        elif time.monotonic() >= pause.until_s:
            await registry.attach_again(guest, summed(guest.earlier, guest.memory.last_ledger))
    except HintfleetError as error:
        await _failed(registry, guest, error)
        pause.until_s = time.monotonic() + pause.length_s
        pause.length_s = min(2 * pause.length_s, _LONGEST_PAUSE_S)


async def _failed(registry: Registry, guest: Guest, error: HintfleetError) -> None:
    """End a guest whose domain does not exist any more; for others, log why the attempt failed."""
    try:
        if isinstance(error, GuestLost):
            await registry.end(guest)
            return
    except HintfleetError as another:
        error = another
    about = {"guest": guest.name, "reason": error.message}
    _log.warning("guest not attached again", extra=fields(**about))

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

# libvirt reports starts by events, but events are lost with libvirtd. To ask costs less than a
# millisecond, and only while a guest waits.
_PERIOD_S = 5.0
# A domain that has just started cannot be attached before its kernel binds the door's device. One
# that cannot be attached at all is not bothered all the time.
_LONGEST_PAUSE_S = 300.0

_log = logging.getLogger("hintfleet.host.guest")


async def attach_when_started(registry: Registry, driver: Attacher) -> None:
    """Attach guests again whose domain runs, until cancelled."""
    pauses: dict[str, _Pause] = {}
    while True:
        await asyncio.sleep(_PERIOD_S)
        waiting = [guest for guest in registry.guests if guest.to_attach_again is not None]
        pauses = {guest.uuid: pauses.get(guest.uuid, _Pause()) for guest in waiting}
        # At the same time: an attempt at a domain that boots takes many seconds.
        await asyncio.gather(*(_turn(registry, driver, g, pauses[g.uuid]) for g in waiting))


@dataclass
class _Pause:
    """When the next attempt is due, and how long the pause after that is if it fails."""

    until_s: float = 0.0
    length_s: float = _PERIOD_S


async def _turn(registry: Registry, driver: Attacher, guest: Guest, pause: _Pause) -> None:
    """Attach a guest again if its domain runs and the pause after the last attempt is over."""
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
    """Log why a guest was not attached; end it if there is no such domain any more."""
    try:
        if isinstance(error, GuestLost):
            await registry.end(guest)
            return
    except HintfleetError as another:
        error = another
    about = {"guest": guest.name, "reason": error.message}
    _log.warning("guest not attached again", extra=fields(**about))

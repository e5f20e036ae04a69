"""Attaches guests again whose domain had ended and has started again; ends those whose domain does
not exist any more.

While the domain does not run, the guest is kept with closed books. When the guest is attached
again, new books begin, and `Guest.earlier` has the sums of the closed ones.
"""

from __future__ import annotations

import asyncio
import logging
import time

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
    pauses: dict[str, tuple[float, float]] = {}
    while True:
        await asyncio.sleep(_PERIOD_S)
        waiting = [guest for guest in registry.guests if guest.to_attach_again is not None]
        pauses = {guest.uuid: pauses.get(guest.uuid, (0.0, _PERIOD_S)) for guest in waiting}
        for guest in waiting:
            next_s, pause_s = pauses[guest.uuid]
            if time.monotonic() >= next_s and not await _attached(registry, driver, guest):
                pauses[guest.uuid] = time.monotonic() + pause_s, min(2 * pause_s, _LONGEST_PAUSE_S)


async def _attached(registry: Registry, driver: Attacher, guest: Guest) -> bool:
    """Attach a guest again if its domain runs; return false if that failed. End the guest if there
    is no such domain any more."""
    try:
        if not await in_driver_thread(driver.runs, guest.uuid):
            return True
        await registry.attach_again(guest, summed(guest.earlier, guest.memory.last_ledger))
    except GuestLost:
        await registry.end(guest)
    except HintfleetError as error:
        about = {"guest": guest.name, "reason": error.message}
        _log.warning("guest not attached again", extra=fields(**about))
        return False
    return True

"""Attaches running domains of somebody else, and detaches them.

An attached guest belongs to no trial. If its domain ends, the guest is kept until the domain starts
again (attaching_again.py) or is removed from libvirt. The guest ends if it is detached, or if its
memory door is taken out of the running domain. When the host agent ends, it detaches the guest;
with --state it does not (unless its parent is gone, see --lifeline-fd), and the next host agent
adopts the guest.
"""

from __future__ import annotations

import asyncio

from hintfleet.errors import NotFound, Refused
from hintfleet.settings import IsolatorKind
from hintfleet.v1 import host_pb2
from host_agent.api.sampling import guest_message
from host_agent.guest import Guest, checked_uuid, is_guest_name
from host_agent.guests.attached.driver import AttachedDriver
from host_agent.guests.attached.obstacles import refuse_if_any
from host_agent.registry import Registry
from host_agent.threads import in_driver_thread


async def domains(registry: Registry, driver: AttachedDriver) -> list[host_pb2.Domain]:
    """Return all domains of this host's libvirt, sorted by name, each with its obstacles.

    :raises Refused: libvirt does not answer.
    """
    found = await in_driver_thread(driver.domains)
    for domain in found:
        if guest := _attached(registry, domain):
            # The driver took our own door for another host agent's: replace what it found.
            del domain.obstacles[:]
            domain.obstacles.add(what=f"it is attached, as guest {guest.name}", change="nothing")
    return found


def _attached(registry: Registry, domain: host_pb2.Domain) -> Guest | None:
    return next((g for g in registry.guests if g.is_attached and g.uuid == domain.uuid), None)


async def attach(
    registry: Registry, driver: AttachedDriver, request: host_pb2.AttachGuestRequest
) -> host_pb2.AttachGuestResponse:
    """Attach a domain; with dry_run, only return it with its obstacles. See host.proto.

    After an error, a memory door that this call plugged in is taken out again, if the guest
    releases it.

    :raises NotFound: there is no such domain.
    :raises Refused: it cannot be attached; says why.
    :raises InvalidInput: a setting is out of its bounds.
    :raises GuestLost: the domain is gone.
    :raises OutcomeUnknown: the guest did not release a door in time.
    :raises TransientError: the state cannot be written.
    """
    domain = await in_driver_thread(driver.find, request.domain)
    if request.dry_run:
        return host_pb2.AttachGuestResponse(domain=domain)
    if guest_there := _attached(registry, domain):
        raise Refused(
            f"domain {domain.name} is attached already, as guest {guest_there.name}",
            hint="`hintfleet guests` says whether it hints, and why not; `hintfleet detach` it"
            " first to attach it anew",
        )
    refuse_if_any(domain)
    guest = _added(registry, domain, request.hinting)
    try:
        # Checked before the door is plugged in: wrong settings must change nothing in the domain.
        config = driver.agent_config(registry.request(guest), request.server)
        guest.creation = asyncio.create_task(registry.make(guest))
        await asyncio.shield(guest.creation)
        if request.through_guest_agent:
            await in_driver_thread(driver.start_agent, guest.uuid, config)
    except BaseException:
        await registry.end_unless_left(guest)
        raise
    return host_pb2.AttachGuestResponse(
        domain=domain, guest=await guest_message(guest), agent_config=config
    )


def _added(registry: Registry, domain: host_pb2.Domain, hinting: host_pb2.HintingSettings) -> Guest:
    spec = host_pb2.GuestSpec(
        driver=host_pb2.ATTACHED,
        memory_bytes=domain.memory_bytes,
        method=host_pb2.HINTING,
        hinting=hinting,
    )
    spec.hinting.isolator = hinting.isolator or IsolatorKind.HUGETLB  # HUGETLB needs no module
    uuid_text = checked_uuid(domain.uuid, registry.guests)
    is_free = is_guest_name(domain.name) and domain.name not in [g.name for g in registry.guests]
    name = domain.name if is_free else uuid_text
    return registry.add(name, uuid_text, "", spec)


async def detach(
    registry: Registry, driver: AttachedDriver, request: host_pb2.DetachGuestRequest
) -> host_pb2.DetachGuestResponse:
    """Have the guest stop hinting, wait until no batch is in flight (two seconds at most), unplug
    its memory door, and return the closed books. With through_guest_agent, stop its agent before.

    :raises NotFound: no such domain is attached.
    :raises HintfleetError: the agent could not be stopped; the guest stays attached. Or the door
        could not be taken out; the guest stays in the list, but is not hinted any more. In both
        cases `detach` can be called again.
    :raises TransientError: the guest is detached, but the state cannot be written.
    """
    found = [g for g in registry.guests if g.is_attached and request.name in (g.name, g.uuid)]
    if not found:
        raise NotFound(f"no attached guest {request.name!r} on this host")
    if request.through_guest_agent:
        await in_driver_thread(driver.stop_agent, found[0].uuid)
    await found[0].sessions.rest()
    ledger = await registry.end(found[0])
    return host_pb2.DetachGuestResponse(ledger=ledger, earlier=found[0].earlier)

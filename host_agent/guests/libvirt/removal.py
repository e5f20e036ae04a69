"""Takes a device out of a running domain, and waits until QEMU has removed it."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import Any

from hintfleet.errors import OutcomeUnknown, Refused
from host_agent.guests.libvirt.api import errors_as, modules

# The guest's kernel needs some milliseconds, if it runs.
_REMOVAL_S = 20.0


def detach(domain: Any, alias: str, xml: str) -> None:
    """Detach a device and wait until QEMU has removed it.

    :param alias: libvirt's name for the device.
    :param xml: its element of the live XML.
    :raises Refused: the guest refused; the device stays.
    :raises OutcomeUnknown: the guest did not answer in time.
    """
    libvirt, _ = modules()
    # Subscribe before detaching: detachDeviceFlags returns when the guest has been asked, and
    # only an event tells what the guest did.
    with _removal_of(alias, domain) as removed:
        with errors_as(f"unplugging {alias}"):
            domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            was_removed = removed.get(timeout=_REMOVAL_S)
        except queue.Empty:
            raise OutcomeUnknown(
                f"the guest did not release {alias} within {_REMOVAL_S:g} s"
            ) from None
    if not was_removed:
        raise Refused(f"the guest refused to release {alias}")


@contextlib.contextmanager
def _removal_of(alias: str, domain: Any) -> Iterator[queue.SimpleQueue[bool]]:
    """Subscribe to the removal of a device during the block: the queue gets whether it was
    removed, once libvirt knows."""
    libvirt, _ = modules()
    results: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def on_event(_connection: Any, _domain: Any, removed: str, was_removed: bool) -> None:
        if removed == alias:
            results.put(was_removed)

    with contextlib.ExitStack() as undo, errors_as("subscribing to libvirt's events"):
        connection = domain.connect()
        for event, was_removed in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, True),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, False),
        ):
            number = connection.domainEventRegisterAny(domain, event, on_event, was_removed)
            undo.callback(connection.domainEventDeregisterAny, number)
        yield results

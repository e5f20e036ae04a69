"""Memory hotplug: a running guest gets more memory, or gives some of it back.

Plugging: the driver plugs the memory, it is added to the RAM and the books, and then the guest is
told to use it. Unplugging is the reverse: the guest stops using the memory (it may refuse), the
driver unplugs it, and then it is freed and removed from the RAM and the books. So the host never
frees memory that a guest still uses. Hinting continues meanwhile. guests/libvirt/dimms.py plugs a
DIMM into a VM.

An attached guest is not resized from here. Its operator plugs and unplugs memory; `follow_table`
changes the RAM and the books accordingly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hintfleet.errors import (
    GuestLost,
    HintfleetError,
    InvalidInput,
    OutcomeUnknown,
    Refused,
    TransientError,
)
from hintfleet.logs import fields
from hintfleet.ranges import RangeSet, encode
from hintfleet.system.machine_limits import total_memory
from hintfleet.units import MIB, format_size
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.guest import Guest, has_memory
from host_agent.guests.driver import RunningGuest
from host_agent.memory.ram import close_files
from host_agent.threads import in_driver_thread

# Linux adds and removes memory in sections of its sparse memory model: 2^27 bytes on x86-64
# (SECTION_SIZE_BITS, arch/x86/include/asm/sparsemem.h).
SECTION_BYTES = 128 * MIB

_log = logging.getLogger("hintfleet.host.guest")


def check_memory(name: str, spec: host_pb2.GuestSpec) -> None:
    """Check that a guest's start size is whole MiB, that `check_maximum` allows its maximum, and
    that this process may use as much memory as the larger of the two.

    :raises InvalidInput: a size is not allowed.
    :raises Refused: this process may not use as much.
    """
    if not spec.memory_bytes or spec.memory_bytes % MIB:
        raise InvalidInput(f"guest {name}: memory must be whole MiB, not {spec.memory_bytes} bytes")
    check_maximum(name, spec)
    size_bytes = max(spec.memory_bytes, spec.max_memory_bytes)
    total = total_memory()
    if size_bytes > total.value:
        raise Refused(
            f"guest {name}: memory of {format_size(size_bytes)} is more than the "
            f"{format_size(total.value)} {total.where}",
            hint="make the guest smaller" + total.or_raise,
        )


def check_maximum(name: str, spec: host_pb2.GuestSpec) -> None:
    """Check that a guest's maximum size, if it has one, is its start size plus whole sections.

    :raises InvalidInput: it is not, or the method is the balloon; says why.
    """
    if not spec.max_memory_bytes:
        return
    if spec.method == host_pb2.BALLOON:
        raise InvalidInput(
            f"guest {name}: max_memory_bytes cannot be used with method balloon, which moves the"
            " guest's size itself"
        )
    _check_step(name, spec, spec.max_memory_bytes)


def check(name: str, spec: host_pb2.GuestSpec, memory_bytes: int) -> None:
    """Check that a guest can be resized to `memory_bytes`.

    :raises Refused: its size is fixed, or it is an attached guest.
    :raises InvalidInput: less than the start size, more than the maximum, or not the start size
        plus whole sections.
    """
    if spec.driver == host_pb2.ATTACHED:
        raise Refused(f"guest {name} is somebody else's domain: it is not resized from here")
    if not spec.max_memory_bytes:
        raise Refused(f"guest {name} cannot be resized", hint="create it with max_memory_bytes")
    if memory_bytes > spec.max_memory_bytes:
        raise InvalidInput(
            f"guest {name}: {format_size(memory_bytes)} is more than its maximum of "
            f"{format_size(spec.max_memory_bytes)}"
        )
    _check_step(name, spec, memory_bytes)


def _check_step(name: str, spec: host_pb2.GuestSpec, memory_bytes: int) -> None:
    more_bytes = memory_bytes - spec.memory_bytes
    if more_bytes < 0:
        raise InvalidInput(
            f"guest {name}: {format_size(memory_bytes)} is less than the "
            f"{format_size(spec.memory_bytes)} that it starts with"
        )
    if more_bytes % SECTION_BYTES:
        raise InvalidInput(
            f"guest {name}: {more_bytes} bytes more than the {format_size(spec.memory_bytes)} that "
            f"it starts with are no multiple of {format_size(SECTION_BYTES)}"
        )


def follow_table(guest: Guest) -> None:
    """From now on, change the RAM and the books of an attached guest whenever its memory door's
    table changes: its operator may plug and unplug memory. Do nothing for other guests."""
    door = guest.running.door if guest.running else None
    if guest.is_attached and door is not None:
        door.when_table_changes(lambda: guest.tasks.begin(_follow(guest)))
        # QEMU may have changed its table before the line above, so compare once now.
        guest.tasks.begin(_follow(guest))


async def _follow(guest: Guest) -> None:
    async with guest.memory.lock:
        if guest.running is None or (door := guest.running.door) is None:
            return
        ram = guest.running.ram
        if not door.pages():
            return  # QEMU has hung up: leave the books as they are
        if not (gone := ram.pages - door.pages()) and not door.pages() - ram.pages:
            return
        try:
            if gone:
                guest.memory.taken_out(gone)
            segments = door.segments(besides=ram.pages)
            try:
                guest.memory.plugged(segments)
            except HintfleetError:  # the guest does not run any more
                close_files(segments)
                raise
        except (HintfleetError, OSError) as error:  # it cannot be punched, or no descriptor is free
            about = {"guest": guest.name, "reason": str(error)}
            _log.warning("memory cannot be followed", extra=fields(**about))
            return
    now_bytes = guest.provisioned_bytes
    _log.info("memory changed", extra=fields(guest=guest.name, now_bytes=now_bytes))


async def resize(guest: Guest, memory_bytes: int) -> None:
    """Plug or unplug memory until the guest has `memory_bytes`. The work continues if the caller
    is cancelled, so that it is never left half done.

    :raises InvalidInput: as `check`.
    :raises Refused: as `check`; or the guest still uses the memory, or the driver cannot plug
        or unplug this size. The guest has what it had before, less the devices that were
        unplugged before a later one was refused, or plus a new one that it did not release.
    :raises GuestLost: the guest is gone.
    :raises TransientError: its agent is not connected now, or the state cannot be written; the
        guest has what it had before.
    :raises OutcomeUnknown: the guest did not answer, or an unplug failed and the guest could not be
        told to use the rest again; it is safe to call `resize` again.
    """
    check(guest.name, guest.spec, memory_bytes)
    await guest.tasks.finish(_resize(guest, memory_bytes))


async def _resize(guest: Guest, memory_bytes: int) -> None:
    async with guest.resize_lock:
        there = await in_driver_thread(_running(guest).plugged)
        # The guest may release a DIMM after an earlier `unplug` has given up waiting. Then the
        # books still have the DIMM's pages: remove them.
        if gone := guest.memory.plugged_pages - there:
            await guest.unplugged(gone)
        # An earlier `plug` may have failed, and left a DIMM that the guest did not release. A new
        # DIMM could not be told apart from it at the memory door.
        if stray := there - guest.memory.plugged_pages:
            await in_driver_thread(_running(guest).unplug, stray)
            there -= stray
        before_bytes = guest.provisioned_bytes
        more_bytes = memory_bytes - before_bytes
        if more_bytes > 0:
            await _grow(guest, more_bytes)
        elif more_bytes < 0:
            await _shrink(guest, -more_bytes)
        elif there:
            # The size is right, but an earlier `online` may have been lost, so that the guest does
            # not use the memory yet: send it again.
            await _tell(guest, pb.WorkloadCommand(online=pb.Online(ranges=encode(there))))
    about = {"guest": guest.name, "before_bytes": before_bytes, "now_bytes": memory_bytes}
    _log.info("guest resized", extra=fields(**about))


async def _grow(guest: Guest, size_bytes: int) -> None:
    running = _running(guest)
    pages = await guest.plugged(await in_driver_thread(running.plug, size_bytes))
    try:
        # Save before the guest uses the memory: a host agent that adopts the guest later must
        # find this memory in the books.
        await guest.saver.save(guest)
        await _tell(guest, pb.WorkloadCommand(online=pb.Online(ranges=encode(pages))))
    except (Refused, TransientError):
        # After Refused or TransientError it is certain that the guest does not use the memory.
        # After other errors that is not certain, so the memory stays plugged.
        await _take(guest, running, pages)
        raise
    except OutcomeUnknown as error:
        error.hint = "the memory is plugged, perhaps without being used: resize the guest back"
        raise


async def _shrink(guest: Guest, size_bytes: int) -> None:
    running = _running(guest)
    left = list(await in_driver_thread(running.to_unplug, size_bytes))
    await _tell(guest, pb.WorkloadCommand(offline=pb.Offline(ranges=_pack(left))))
    try:
        while left:
            await _take(guest, running, left[0])
            del left[0]
    except HintfleetError as error:
        try:
            await _tell(guest, pb.WorkloadCommand(online=pb.Online(ranges=_pack(left))))
        except (Refused, TransientError, OutcomeUnknown) as not_told:
            raise OutcomeUnknown(
                f"{error.message}; and the guest may not use all of its other memory again:"
                f" {not_told.message}",
                hint="resize the guest again",
            ) from error
        raise


async def _take(guest: Guest, running: RunningGuest, pages: RangeSet) -> None:
    await in_driver_thread(running.unplug, pages)
    await guest.unplugged(pages)


def _pack(devices: Sequence[RangeSet]) -> bytes:
    return encode(RangeSet(pages for device in devices for pages in device))


def _running(guest: Guest) -> RunningGuest:
    if guest.running is None or not has_memory(guest):
        raise GuestLost(f"guest {guest.name} does not run")
    return guest.running


async def _tell(guest: Guest, command: pb.WorkloadCommand) -> None:
    def numbered(number: int) -> pb.WorkloadCommand:
        command.command_id = number
        return command

    await guest.sessions.run_step(numbered)

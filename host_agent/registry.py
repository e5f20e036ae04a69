"""Makes, ends and releases the guests of this host agent.

A trial's guests are ended when the trial ends (trials.py), unless this host agent is ending. When
this host agent ends, it ends all guests and detaches the attached ones; with --state it leaves all
of them running instead, unless its parent is gone (--lifeline-fd).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Mapping
from functools import partial

from hintfleet.errors import (
    GuestLost,
    HintfleetError,
    InvalidInput,
    NotFound,
    Refused,
    TransientError,
)
from hintfleet.system.processes import find_process
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.cpu_meter import CpuMeter
from host_agent.guest import Guest, checked_uuid, has_memory, is_guest_name
from host_agent.guests.agent_settings import check_known
from host_agent.guests.driver import Attacher, GuestDriver, GuestMaker, GuestRequest
from host_agent.persistence.database import Database
from host_agent.persistence.saver import Saver
from host_agent.repeated_commands import RepeatedCommands
from host_agent.resizing import check_memory, follow_table
from host_agent.session.gate import Epochs
from host_agent.tasks import about_failure, raise_first
from host_agent.threads import call_on, in_driver_thread
from host_agent.trials import Trials

_log = logging.getLogger("hintfleet.host.registry")

# How long a guest's agent may take to be ready after the driver has made the guest. A virtual
# machine may run under TCG, which is many times slower than KVM.
READY_TIMEOUT_S: Mapping[host_pb2.Driver.ValueType, float] = {
    host_pb2.EMBEDDED: 30.0,
    host_pb2.LIBVIRT: 120.0,
}


class Registry:
    """Owns the guests of this host."""

    def __init__(
        self,
        drivers: Mapping[host_pb2.Driver.ValueType, GuestDriver],
        state: Database | None = None,
        attached: Attacher | None = None,
    ) -> None:
        """:param drivers: make guests for `create` and adopt them, by the driver that a spec names.
        :param state: stores the guests for the next host agent; None: they are not stored.
        :param attached: the driver of attached guests; None: the caller attaches none.
        """
        self.drivers = drivers
        self._attached = attached
        self.saver = Saver(state)
        self.epochs = Epochs()
        self.observing = CpuMeter()
        """Counts the processor time of samples, of checks whether audits are due, and of audits for
        samples and metrics only."""
        self._guests: dict[str, Guest] = {}
        self.shutting_down = False
        """Whether this host agent ends: then no guest is made, and no trial ends any more."""
        self.trials = Trials(self._end_trial, lambda: self.shutting_down)
        self.leaving: set[asyncio.Task[None]] = set()
        """Tasks that end attached guests whose door was disconnected, or close them until they are
        attached again."""
        # A trial's answers stay until the trial ends: its client may retry a command at any time.
        self.commands = RepeatedCommands()

    @property
    def guests(self) -> tuple[Guest, ...]:
        """All guests, including those that are lost, and those still being made or ended."""
        return tuple(self._guests.values())

    def get(self, name: str) -> Guest:
        """Return the guest of this name.

        :raises NotFound: there is none.
        """
        if name not in self._guests:
            raise NotFound(f"no guest {name!r} on this host")
        return self._guests[name]

    def authenticate(self, identity: hinting_pb2.Identity) -> Guest:
        """Return the guest of this UUID and token.

        :raises Refused: no such guest, or not its token. The error is the same for both, so
            that nobody learns which UUIDs exist.
        """
        for guest in self.guests:
            if guest.uuid == identity.guest_uuid and guest.accepts(identity.token):
                return guest
        raise Refused(f"no guest {identity.guest_uuid} with that token on this host")

    # Making and ending guests

    async def create(
        self, name: str, trial_id: str, spec: host_pb2.GuestSpec, guest_uuid: str = ""
    ) -> Guest:
        """Make a guest and wait until it is ready. If this fails, end the guest.

        :raises InvalidInput: the name, the UUID or the spec is invalid.
        :raises Refused: no Watch of the trial is open, the name or UUID is taken, or this machine
            or the driver cannot make the guest.
        :raises GuestLost: it ended or was not ready in time; with its last output.
        :raises TransientError: the state cannot be written, or this host agent ends.
        """
        if name in self._guests:
            await self.room_for(trial_id)
        self._check_new(name, trial_id, spec)
        guest = self.add(name, checked_uuid(guest_uuid, self.guests), trial_id, spec)
        guest.creation = asyncio.create_task(self.make(guest))
        try:
            # Shielded: libvirt's createXML cannot be cancelled. So if the caller is cancelled, the
            # task continues, and `end` waits for it.
            await asyncio.shield(guest.creation)
            await guest.ready(READY_TIMEOUT_S[spec.driver])
        except GuestLost as error:
            evidence = guest.evidence()
            await self.end_unless_left(guest)
            if evidence in error.message:
                raise
            raise GuestLost(f"{error.message}; its last output:\n{evidence}") from error
        except BaseException:
            await self.end_unless_left(guest)
            raise
        return guest

    async def end_unless_left(self, guest: Guest) -> None:
        """End a guest that could not be made, unless this host agent ends and leaves it."""
        if not (self.shutting_down and self.saver.stores):
            await self.end(guest)

    def add(
        self,
        name: str,
        uuid_text: str,
        trial_id: str,
        spec: host_pb2.GuestSpec,
        token: str | None = None,
    ) -> Guest:
        """Register a guest that this host agent does not run yet, and return it. After that, the
        caller must have `make` start or attach it, or have its driver adopt it.

        :param token: of a guest that had one before; None: make a new token.
        :raises TransientError: this host agent ends.
        :raises Refused: there is no such driver, method or policy.
        """
        if self.shutting_down:
            raise TransientError(f"guest {name} is not made: this host agent ends")
        check_known(name, spec)
        guest = self._guests[name] = Guest(
            name=name,
            uuid=uuid_text,
            # The driver puts the token into the configuration of the guest's agent:
            # guests/agent_settings.py.
            token=token or secrets.token_hex(16),
            trial_id=trial_id,
            spec=spec,
            saver=self.saver,
            observing=self.observing,
        )
        return guest

    def _check_new(self, name: str, trial_id: str, spec: host_pb2.GuestSpec) -> None:
        if not is_guest_name(name):
            raise InvalidInput(f"guest name {name!r}: 1 to 64 letters, digits and '-'")
        if name in self._guests:
            raise Refused(f"there is a guest {name!r} on this host already")
        if not self.trials.is_watched(trial_id):
            raise Refused(f"no Watch of trial {trial_id!r} is open", hint="open Watch first")
        check_memory(name, spec)
        if spec.driver not in self.drivers:
            raise InvalidInput(f"guest {name}: its spec names no driver")
        if spec.method == host_pb2.METHOD_UNSPECIFIED:
            raise InvalidInput(f"guest {name}: its spec names no method")

    async def make(self, guest: Guest) -> None:
        """Have a guest's driver make or attach it, open its books, and save it.

        :raises InvalidInput: a setting is out of its bounds.
        :raises Refused: the driver cannot make or attach it.
        :raises GuestLost: the guest ended meanwhile, or the domain to attach is gone.
        :raises OutcomeUnknown: the domain to attach did not release an old memory door in time.
        :raises TransientError: the state cannot be written.
        """
        driver = self.driver_of(guest)
        try:
            running = await in_driver_thread(driver.create, self.request(guest))
        except OSError as error:  # for example, no free descriptor, process or disk space
            raise Refused(f"guest {guest.name} cannot be made: {error}") from error
        guest.started(running)
        follow_table(guest)
        await self.saver.save(guest)

    def request(self, guest: Guest) -> GuestRequest:
        """Return what a driver needs to make, attach or adopt a guest."""
        loop = asyncio.get_running_loop()
        lost = self._attached_lost if guest.is_attached else _made_lost
        return GuestRequest(
            name=guest.name,
            uuid=guest.uuid,
            token=guest.token,
            spec=guest.spec,
            on_gone=lambda reason: call_on(loop, partial(lost, guest, reason)),
        )

    def driver_of(self, guest: Guest) -> GuestMaker:
        """Return the driver that makes, attaches or adopts this guest."""
        if guest.is_attached and self._attached is not None:
            return self._attached
        return self.drivers[guest.spec.driver]

    async def destroy(self, name: str) -> host_pb2.Ledger:
        """End a guest and return its closed books.

        :raises NotFound: there is none.
        :raises Refused: it is an attached guest, which must be detached instead.
        :raises HintfleetError: the driver could not end it; it stays registered, so that
            `destroy` can be called again.
        :raises TransientError: it is ended, but the state cannot be written.
        """
        guest = self.get(name)
        if guest.is_attached:
            raise Refused(
                f"guest {name} is somebody else's domain, and is not destroyed from here",
                hint=f"hintfleet detach {name}",
            )
        return await self.end(guest)

    async def end(self, guest: Guest) -> host_pb2.Ledger:
        """End a guest, or detach its domain if it is attached; return its closed books. May be
        called again.

        :raises HintfleetError: the driver or the state failed; what that means is at `destroy`.
        """
        guest.ending, guest.to_attach_again = True, None
        ledger = await guest.close()
        # Two callers may end a guest at once, and another guest may have its name by now.
        if self._guests.get(guest.name) is guest:
            del self._guests[guest.name]
            await self.saver.forget(guest)
        return ledger

    def _attached_lost(self, guest: Guest, reason: str) -> None:
        """End the epoch of an attached guest whose door is disconnected. Begin to find out whether
        its domain has ended: if so, keep the guest until the domain starts again; else end it."""
        guest.lost(reason)
        if self.shutting_down or guest.to_attach_again is not None:
            return  # this host agent ends, or the guest is kept already
        task = asyncio.create_task(self._keep_or_end(guest))
        self.leaving.add(task)
        task.add_done_callback(self.leaving.discard)

    async def _keep_or_end(self, guest: Guest) -> None:
        if guest.creation is not None:
            await asyncio.wait([guest.creation])  # it sets `running`, unless it fails
        await guest.audits.ledger()  # the record must have the last books
        record = guest.record()
        await _free_if_ended(guest)
        has_ended = False
        if self._attached is not None and guest.running is not None:
            try:
                has_ended = await in_driver_thread(
                    self._attached.has_ended, guest.uuid, guest.running.handle
                )
            except HintfleetError:  # libvirt does not answer: assume that the domain has ended
                has_ended = True
        if not has_ended or record is None or guest.ending:
            return await self._destroy_all([guest])
        guest.to_attach_again = record
        try:
            await guest.close()
            if self._guests.get(guest.name) is guest and not guest.ending:
                await self.saver.save(guest)
        except HintfleetError as error:
            _log.error("guest cannot be ended", **about_failure(guest.name, error))

    async def attach_again(self, ended: Guest, earlier: host_pb2.Ledger) -> None:
        """Attach a guest again whose domain has started again. It keeps its name and token.

        :param earlier: sums of the books of the domain's earlier starts.
        :raises HintfleetError: it cannot be attached; it waits to be attached, as before.
        """
        await ended.close()  # not closed yet if libvirt did not answer when its domain ended
        if ended.ending or self._guests.get(ended.name) is not ended:
            return  # the guest was detached meanwhile
        guest = self.add(ended.name, ended.uuid, "", ended.spec, ended.token)
        guest.earlier = earlier
        guest.creation = asyncio.create_task(self.make(guest))
        try:
            await asyncio.shield(guest.creation)
        except BaseException:
            if not guest.ending and self._guests.get(ended.name) is guest:
                self._guests[ended.name] = ended
                self.saver.changed(ended)
            await guest.close()  # waits until `creation` has ended
            raise

    # Trials

    async def room_for(self, trial_id: str) -> None:
        """Wait until all other trials have ended that nobody watches (`Trials.others_ended`). Try
        again to end guests that could not be ended."""
        trials = {guest.trial_id for guest in self.guests}
        for gone in trials - {guest.trial_id for guest in self.guests if has_memory(guest)}:
            self.trials.end_grace(gone)  # nobody would watch it again
        await self.trials.others_ended(trial_id)
        others = [g for g in self.guests if g.ending and g.trial_id not in ("", trial_id)]
        await self._destroy_all(others)

    async def _end_trial(self, trial_id: str) -> None:
        await self._destroy_all([g for g in self.guests if g.trial_id == trial_id])
        self.commands.forget(trial_id)

    async def end_all(self) -> None:
        """End every guest; detach the attached ones. If a guest cannot be ended, log that."""
        await self._finish()
        await self._destroy_all(self.guests)

    async def leave(self) -> None:
        """Save and release all guests. They live on, and the next host agent can adopt them.

        :raises TransientError: the state cannot be written, so it has older books of some guests.
            All are released all the same. The first error is raised, the others are logged.
        """
        await self._finish()
        guests = self.guests
        left = await asyncio.gather(*(g.leave() for g in guests), return_exceptions=True)
        raise_first([guest.name for guest in guests], left)

    async def _finish(self) -> None:
        await self.trials.finish()
        await asyncio.gather(*self.leaving)

    async def close(self) -> None:
        """Close the drivers; call it after `end_all` or `leave`."""
        for driver in (*self.drivers.values(), *([self._attached] if self._attached else [])):
            await in_driver_thread(driver.close)

    async def _destroy_all(self, guests: tuple[Guest, ...] | list[Guest]) -> None:
        ended = await asyncio.gather(*(self.end(g) for g in guests), return_exceptions=True)
        for guest, error in zip(guests, ended, strict=True):
            if isinstance(error, BaseException):
                _log.error("guest cannot be ended", **about_failure(guest.name, error))


def _made_lost(guest: Guest, reason: str) -> None:
    guest.lost(reason)
    guest.tasks.begin(_free_if_ended(guest))


async def _free_if_ended(guest: Guest) -> None:
    """Free the RAM of a guest whose process has ended. Otherwise our descriptors alone would keep
    its memory: a kernel that is out of memory, and has killed this guest, would kill others."""
    async with guest.resize_lock:
        if guest.running is not None and not _is_alive(guest.running.pid):
            await guest.memory.run_locked(guest.memory.free())


def _is_alive(pid: int) -> bool:
    try:
        if find_process(pid) is None:
            os.kill(pid, 0)  # with hidepid, /proc does not show it
            return False  # a zombie
    except ProcessLookupError:
        return False
    except OSError:  # of another user; or no descriptor is free to look
        return True
    return True

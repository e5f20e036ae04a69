"""All guests of this host, by name and by trial, and who keeps them alive."""

from __future__ import annotations

import asyncio
import os
import secrets
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar, cast

from hintfleet.errors import GuestLost, InvalidInput, NotFound, Refused
from hintfleet.units import MIB, format_size
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.gate import Epochs
from host_agent.guest import Guest
from host_agent.guests import GuestDriver, GuestRequest

_T = TypeVar("_T")

READY_TIMEOUT_S: Mapping[host_pb2.Driver.ValueType, float] = {
    host_pb2.EMBEDDED: 30.0,
    host_pb2.LIBVIRT: 120.0,
}
"""How long a guest may take to boot and attach."""

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_LONGEST_NAME = 64


class Registry:
    """Owns the guests of this host."""

    def __init__(self, drivers: Mapping[host_pb2.Driver.ValueType, GuestDriver]) -> None:
        self.drivers = drivers
        self.epochs = Epochs()
        self._guests: dict[str, Guest] = {}
        self._watches: Counter[str] = Counter()
        self._ending: set[asyncio.Task[None]] = set()
        self._done: dict[tuple[str, str, int], asyncio.Task[object]] = {}

    @property
    def guests(self) -> tuple[Guest, ...]:
        """All guests that were made and not destroyed yet."""
        return tuple(self._guests.values())

    def get(self, name: str) -> Guest:
        """A guest by its name.

        :raises NotFound: there is none.
        """
        if name not in self._guests:
            raise NotFound(f"no guest {name!r} on this host")
        return self._guests[name]

    def authenticate(self, identity: hinting_pb2.Identity) -> Guest:
        """The guest that an identity proves to be.

        :raises Refused: no such guest, or not its token (the answer is the same).
        """
        for guest in self.guests:
            if guest.uuid == identity.guest_uuid and guest.accepts(identity.token):
                return guest
        raise Refused(f"no guest {identity.guest_uuid} with that token on this host")

    # Making and ending guests

    async def create(self, name: str, trial_id: str, spec: host_pb2.GuestSpec) -> Guest:
        """Make a guest and wait until its agent is ready; nothing stays after a failure.

        :raises Refused: no watch holds the trial, the name is taken, or the driver cannot.
        :raises GuestLost: it ended or did not attach in time; with its last output.
        """
        self._check_new(name, trial_id, spec)
        guest = Guest(
            name=name,
            uuid=str(uuid.uuid4()),
            token=secrets.token_hex(16),
            trial_id=trial_id,
            spec=spec,
        )
        self._guests[name] = guest
        try:
            await self._start(guest)
            await guest.ready(READY_TIMEOUT_S[spec.driver])
        except GuestLost as error:
            evidence = guest.evidence()
            await self.destroy(name)
            raise GuestLost(f"{error.message}; its last output:\n{evidence}") from error
        except BaseException:
            await self.destroy(name)
            raise
        return guest

    def _check_new(self, name: str, trial_id: str, spec: host_pb2.GuestSpec) -> None:
        if not name or len(name) > _LONGEST_NAME or not set(name) <= _NAME_CHARACTERS:
            raise InvalidInput(f"guest name {name!r}: 1 to 64 letters, digits and '-'")
        if name in self._guests:
            raise Refused(f"there is a guest {name!r} on this host already")
        if not self._watches[trial_id]:
            raise Refused(f"no Watch of trial {trial_id!r} is open", hint="open Watch first")
        _check_memory(name, spec.memory_bytes)
        if spec.driver not in self.drivers:
            raise InvalidInput(f"guest {name}: no driver is named")
        if spec.method == host_pb2.METHOD_UNSPECIFIED:
            raise InvalidInput(f"guest {name}: no method is named")

    async def _start(self, guest: Guest) -> None:
        loop = asyncio.get_running_loop()
        request = GuestRequest(
            name=guest.name,
            uuid=guest.uuid,
            token=guest.token,
            spec=guest.spec,
            on_gone=lambda reason: _tell(loop, guest, reason),
        )
        # Shielded: a domain that is being made cannot be called back, and must be known
        # here before it is destroyed.
        make = asyncio.create_task(self._make(guest, request))
        try:
            await asyncio.shield(make)
        except asyncio.CancelledError:
            await asyncio.wait([make])
            raise

    async def _make(self, guest: Guest, request: GuestRequest) -> None:
        driver = self.drivers[guest.spec.driver]
        guest.started(await asyncio.to_thread(driver.create, request))

    async def destroy(self, name: str) -> host_pb2.Ledger:
        """End a guest and return its closed books.

        :raises NotFound: there is none.
        """
        guest = self.get(name)
        ledger = await guest.close()
        self._guests.pop(name, None)
        return ledger

    # Trials

    def open_watch(self, trial_id: str) -> None:
        """One more stream keeps the guests of this trial alive."""
        self._watches[trial_id] += 1

    def close_watch(self, trial_id: str) -> None:
        """One stream less; the last one takes the trial's guests with it.

        Not a coroutine: a stream that was cancelled could not wait for one.
        """
        self._watches[trial_id] -= 1
        if self._watches[trial_id] > 0:
            return
        del self._watches[trial_id]
        task = asyncio.create_task(self._end_trial(trial_id))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end_trial(self, trial_id: str) -> None:
        await self._destroy_all([g for g in self.guests if g.trial_id == trial_id])
        for key in [key for key in self._done if key[1] == trial_id]:
            del self._done[key]

    async def close(self) -> None:
        """Destroy every guest, then close the drivers."""
        await asyncio.gather(*self._ending)
        await self._destroy_all(self.guests)
        for driver in self.drivers.values():
            await asyncio.to_thread(driver.close)

    async def _destroy_all(self, guests: tuple[Guest, ...] | list[Guest]) -> None:
        await asyncio.gather(*(self.destroy(g.name) for g in guests), return_exceptions=True)

    # Commands

    async def once(self, command: host_pb2.CommandId, do: Callable[[], Awaitable[_T]]) -> _T:
        """Carry out a command; a retry of it (same id) gets the first one's answer.

        A command without an id is always carried out.
        """
        if not command.sequence:
            return await do()
        key = (command.run_id, command.trial_id, command.sequence)
        task = self._done.get(key)
        if task is None:
            task = self._done[key] = asyncio.ensure_future(_as_coroutine(do))
        return cast(_T, await asyncio.shield(task))


def _check_memory(name: str, size_bytes: int) -> None:
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not size_bytes or size_bytes % MIB:
        raise InvalidInput(f"guest {name}: memory must be whole MiB, not {size_bytes} bytes")
    if size_bytes > physical_bytes:
        raise Refused(
            f"guest {name}: memory of {format_size(size_bytes)} is more than "
            f"this machine's {format_size(physical_bytes)}"
        )


async def _as_coroutine(do: Callable[[], Awaitable[object]]) -> object:
    return await do()


def _tell(loop: asyncio.AbstractEventLoop, guest: Guest, reason: str) -> None:
    """Drivers speak from their own threads; after the loop has closed nobody listens."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(guest.lost, reason)

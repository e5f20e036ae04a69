"""A place runs one guest after the other, and keeps each at work until it is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.torture.guest import Victim
from tests.torture.report import Report

if TYPE_CHECKING:  # HostServiceAsyncStub is in the .pyi file only
    from hintfleet.v1.host_pb2_grpc import HostServiceAsyncStub

TRIAL = "torture"

_PAUSE_AFTER_FAILURE_S = 0.05
_GONE = (grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND)


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long guests of one driver may take.

    :ivar create_s: for the creation of a guest, or for one attempt to attach a domain.
    :ivar step_s: for each other call.
    :ivar silence_s: the longest time without any answer to a step, without success in attaching, or
        for each of the last checks, however many faults there are.
    """

    create_s: float
    step_s: float
    silence_s: float


class Place:
    """Makes a guest, has it allocate, free and verify, and makes the next when it is lost.

    :cvar pause_s: the pause after a failed attempt to make a guest.
    """

    pause_s = _PAUSE_AFTER_FAILURE_S

    def __init__(
        self,
        *,
        name: str,
        spec: host_pb2.GuestSpec,
        stub: HostServiceAsyncStub,
        report: Report,
        deadlines: Deadlines,
        busy_share: float,
        seed: str,
        victim_of: Callable[[host_pb2.Guest], Awaitable[Victim]],
    ) -> None:
        self.name = name
        self.spec = spec
        self._stub = stub
        self._report = report
        self._deadlines = deadlines
        self._most_bytes = int(spec.memory_bytes * busy_share)
        self._random = random.Random(seed)
        self._victim_of = victim_of
        self._made = 0
        self._held_bytes, self._unsure = 0, False
        self._there: Victim | None = None
        self._is_there = asyncio.Event()

    @property
    def label(self) -> str:
        """The name of the guest in the report; no other guest has it."""
        return f"{self.name}-{self._made}"

    async def victim(self) -> Victim:
        """Return the guest of this place; wait for one if there is none."""
        while self._there is None:
            await self._is_there.wait()
        return self._there

    async def work(self, stop: asyncio.Event) -> None:
        """Keep a guest at work, and make another when it is gone, until `stop` is set."""
        while not stop.is_set():
            if self._there is None:
                await self._make()
            else:
                await self._step(self._there)

    async def finish(self) -> None:
        """Check the guest after the last fault: all memory that this place uses can be allocated,
        has the right contents and is free afterwards, and the books balance. All memory of an
        embedded guest comes back. Report as a problem what does not hold."""
        try:
            # No more faults come, but one may have ended the guest, and no step has noticed it yet.
            while self._there is None or self._there.doomed:
                if self._there is not None:
                    await self._lost(self._there)
                await self._make()
                if not self._report.is_well:
                    return
            victim = self._there
            for step in (self._fill, self._empty, self._settle):
                await self._persist(partial(step, victim))
            await victim.stand_still()
            self._check_books(victim, await self._books(victim))
        except grpc.RpcError as error:
            self._report.problem(f"{self.name}, after the faults: {error.code()} {error.details()}")

    def read_console(self) -> None:
        """Add to the report what is new on the guest's console."""
        if self._there is not None:
            self._there.read_console(self._report)

    async def destroy(self) -> None:
        """End or detach the guest, if there is one."""
        if self._there is not None:
            await self._lost(self._there)

    # Making and ending guests

    async def _make(self) -> None:
        self._made += 1
        try:
            await self._sweep()
            self._there = await self._victim_of(await self._begin())
        except (grpc.RpcError, ProcessLookupError) as error:
            self._not_made(error)
            await asyncio.sleep(self.pause_s)
            return
        self._report.guests_made += 1
        self._held_bytes, self._unsure = 0, False
        self._is_there.set()

    async def _begin(self) -> host_pb2.Guest:
        """Make the guest."""
        return await self._stub.CreateGuest(
            host_pb2.CreateGuestRequest(
                command=host_pb2.CommandId(trial_id=TRIAL),
                name=self.label,
                spec=self.spec,
            ),
            timeout=self._deadlines.create_s,
            wait_for_ready=True,
        )

    def _not_made(self, error: grpc.RpcError | ProcessLookupError) -> None:
        # The host agent may have died meanwhile, which is not a problem. But ABORTED is one: the
        # guest was lost.
        if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.ABORTED:
            self._report.problem(f"guest {self.label} did not come: {error.details()}")

    def _is_here(self, name: str) -> bool:
        """Return whether a guest of this name is one of this place."""
        return name.startswith(f"{self.name}-")

    async def _sweep(self) -> None:
        """End all guests of this place that the host agent lists: there may be some whose creation
        or end an earlier host agent did not finish before it died."""
        listed = await self._stub.ListGuests(
            host_pb2.ListGuestsRequest(), timeout=self._deadlines.step_s, wait_for_ready=True
        )
        for guest in listed.guests:
            if self._is_here(guest.name):
                await self._destroy(guest.name)

    async def _lost(self, victim: Victim) -> None:
        victim.read_console(self._report)
        self._there = None
        self._is_there.clear()
        victim.forget()
        await self._destroy(victim.name)

    async def _destroy(self, name: str) -> None:
        request = host_pb2.DestroyGuestRequest(name=name)
        try:
            closed = await self._stub.DestroyGuest(
                request, timeout=self._deadlines.step_s, wait_for_ready=True
            )
            self._report.books(name, closed.ledger)
        except grpc.RpcError:  # the guest is gone, or will end with its trial
            pass

    # Steps of the workload

    async def _step(self, victim: Victim) -> None:
        try:
            await self._run_step(victim, **self._next_step())
        except grpc.RpcError as error:
            await self._failed(victim, error)

    def _next_step(self) -> dict[str, int | bool]:
        room_bytes = self._most_bytes - self._held_bytes
        choice = self._random.random()
        if choice < 0.3 or self._unsure:
            return {"verify": True}
        if self._held_bytes and (choice < 0.65 or room_bytes < 4 * MIB):
            return {"free_bytes": self._random.randrange(2 * MIB, self._held_bytes + 2 * MIB)}
        return {"allocate_bytes": self._random.randrange(2 * MIB, max(room_bytes, 4 * MIB))}

    async def _run_step(self, victim: Victim, **step: int | bool) -> None:
        request = host_pb2.RunStepRequest(
            guest_name=victim.name,
            seed=self._random.getrandbits(32),
            **step,  # type: ignore[arg-type]
        )
        done = await self._stub.RunStep(request, timeout=self._deadlines.step_s)
        self._held_bytes, self._unsure = done.held_bytes, False
        victim.answered_s = time.monotonic()
        self._report.step_done(done, victim.name)

    async def _failed(self, victim: Victim, error: grpc.RpcError) -> None:
        said = f"guest {victim.name}: {error.details()}"
        if error.code() in _GONE:
            await self._gone(victim, said)
        elif error.code() is grpc.StatusCode.FAILED_PRECONDITION:  # the guest has too little memory
            self._held_bytes = max(self._held_bytes, self._most_bytes)
        else:
            await self._silent(victim, said)

    async def _gone(self, victim: Victim, said: str) -> None:
        if not victim.doomed:
            self._report.problem(f"nobody had ended it: {said}")
        await self._lost(victim)

    async def _silent(self, victim: Victim, said: str) -> None:
        self._report.steps_without_answer += 1
        self._unsure = True  # the step may be done or not, so verify next
        silence_s = time.monotonic() - victim.answered_s
        if silence_s > self._deadlines.silence_s:
            self._report.problem(f"no answer for {silence_s:.0f} s: {said}\n{victim.evidence()}")
            victim.doomed = True
            await self._lost(victim)
        await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _fill(self, victim: Victim) -> None:
        """Allocate all memory that this place uses. Before that, verify to learn how much is held,
        because an earlier answer may be lost."""
        await self._run_step(victim, verify=True)
        if (more_bytes := self._most_bytes - self._held_bytes) > 0:
            await self._run_step(victim, allocate_bytes=more_bytes)

    async def _empty(self, victim: Victim) -> None:
        await self._run_step(victim, verify=True)
        if self._held_bytes:
            await self._run_step(victim, free_bytes=self._held_bytes)

    async def _settle(self, victim: Victim) -> None:
        request = host_pb2.SettleRequest(guest_name=victim.name)
        await self._stub.Settle(request, timeout=self._deadlines.step_s)

    async def _persist(self, do: Callable[[], Awaitable[None]]) -> None:
        """Repeat `do` until it succeeds: it may fail, because the agents in real guests kill
        themselves even after the last fault.

        :raises grpc.RpcError: the guest is gone, or `silence_s` has passed.
        """
        give_up_s = time.monotonic() + self._deadlines.silence_s
        while True:
            try:
                return await do()
            except grpc.RpcError as error:
                if error.code() in _GONE or time.monotonic() > give_up_s:
                    raise
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    # Checks of a guest's books

    async def _books(self, victim: Victim) -> host_pb2.Ledger:
        listed = await self._stub.ListGuests(
            host_pb2.ListGuestsRequest(), timeout=self._deadlines.step_s
        )
        (ledger,) = (guest.ledger for guest in listed.guests if guest.name == victim.name)
        return ledger

    def _check_books(self, victim: Victim, books: host_pb2.Ledger) -> None:
        self._report.books(self.label, books)
        known_bytes = books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
        fates_bytes = (
            books.reclaimed_total_bytes
            + books.absent_total_bytes
            + sum(books.skipped_total_bytes.values())
        )
        if known_bytes != books.provisioned_bytes or fates_bytes != books.hinted_total_bytes:
            self._report.problem(f"guest {victim.name}: the books do not balance: {books}")
        if self.spec.driver == host_pb2.EMBEDDED and books.resident_bytes:
            self._report.problem(f"guest {victim.name}: all is free, not all came back: {books}")

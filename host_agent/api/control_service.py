"""The control API, through which orchestrators and the CLI use this host."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from hintfleet import __version__
from hintfleet.errors import HintfleetError, InvalidInput, OutcomeUnknown, Refused
from hintfleet.logs import fields
from hintfleet.settings import SHORTEST_SAMPLE_PERIOD_MS
from hintfleet.system.machine_limits import processors
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceServicer
from host_agent.api.attaching import attach, detach, domains
from host_agent.api.grpc_calls import Context, abort
from host_agent.api.sampling import SampleFilter, guest_message, sample_set
from host_agent.api.steps import command_of, number_of, response_of
from host_agent.budget.budget import Budget
from host_agent.guest import Guest, pause_hinting
from host_agent.guests.attached.driver import AttachedDriver
from host_agent.registry import Registry
from host_agent.resizing import resize
from host_agent.threads import in_driver_thread
from host_agent.waking import WAKE_S, next_wake_s, sleep_until

_DEFAULT_SETTLE_S = 30.0
_T = TypeVar("_T")

_log = logging.getLogger("hintfleet.host.api")


class ControlService(HostServiceServicer):
    """Serves one host's registry; see host.proto."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        budget: Budget,
        attached: AttachedDriver,
    ) -> None:
        self._registry = registry
        self._attached = attached
        self._name = name
        self._budget = budget
        self._swap_changes = asyncio.Lock()
        self._answered = 0
        """How many commands were answered."""

    async def GetHost(self, request: host_pb2.GetHostRequest, context: Context) -> host_pb2.Host:
        """Return what this host is and what it can run."""
        drivers = self._registry.drivers
        asked = [drivers[kind] for kind in request.drivers or drivers if kind in drivers]
        states = await asyncio.gather(*(in_driver_thread(driver.state) for driver in asked))
        return host_pb2.Host(
            name=self._name,
            agent_version=__version__,
            memory_budget_bytes=self._budget.limit_bytes,
            budget=self._budget.message(),
            drivers=states,
            cpu_count=max(1, int(processors().value)),
            provisioned_bytes=sum(g.provisioned_bytes for g in self._registry.guests),
        )

    async def CreateGuest(
        self, request: host_pb2.CreateGuestRequest, context: Context
    ) -> host_pb2.Guest:
        """Make a guest for a trial and wait until it is ready."""

        async def create() -> host_pb2.Guest:
            await self._use_swap(request)
            guest = await self._registry.create(
                request.name, request.command.trial_id, request.spec, request.uuid
            )
            return await guest_message(guest)

        return await self._once("CreateGuest", request.command, create, context)

    async def _use_swap(self, request: host_pb2.CreateGuestRequest) -> None:
        """Give the host's guests a zram swap of the size that the guest's spec asks for. The size
        can change only while no guest runs, so the first guest of a trial decides it.

        :raises Refused: a guest runs with another size, or no zram can be used.
        """
        async with self._swap_changes:  # a trial's guests are made at the same time
            if self._budget.swap_bytes == request.spec.zram_bytes:
                return
            await self._registry.room_for(request.command.trial_id)
            if guests := self._registry.guests:
                raise Refused(f"guest {guests[0].name} runs with another swap", hint="end it first")
            await in_driver_thread(self._budget.use_swap, request.spec.zram_bytes)

    async def ResizeGuest(
        self, request: host_pb2.ResizeGuestRequest, context: Context
    ) -> host_pb2.Guest:
        """Plug or unplug memory until the guest has the requested size."""

        async def resized() -> host_pb2.Guest:
            guest = self._registry.get(request.name)
            await resize(guest, request.memory_bytes)
            return await guest_message(guest)

        return await self._once("ResizeGuest", request.command, resized, context)

    async def DestroyGuest(
        self, request: host_pb2.DestroyGuestRequest, context: Context
    ) -> host_pb2.DestroyGuestResponse:
        """End a guest and return its closed books."""

        async def destroy() -> host_pb2.DestroyGuestResponse:
            return host_pb2.DestroyGuestResponse(ledger=await self._registry.destroy(request.name))

        return await self._once("DestroyGuest", request.command, destroy, context)

    async def ListGuests(
        self, request: host_pb2.ListGuestsRequest, context: Context
    ) -> host_pb2.ListGuestsResponse:
        """Return all guests with their books, which are audited first."""
        guests = await asyncio.gather(*(guest_message(g) for g in self._registry.guests))
        return host_pb2.ListGuestsResponse(guests=guests)

    async def ListDomains(
        self, request: host_pb2.ListDomainsRequest, context: Context
    ) -> host_pb2.ListDomainsResponse:
        """Return all domains of this host's libvirt, each with its obstacles to being hinted."""
        try:
            return host_pb2.ListDomainsResponse(
                domains=await domains(self._registry, self._attached)
            )
        except HintfleetError as error:
            await abort(context, error)

    async def AttachGuest(
        self, request: host_pb2.AttachGuestRequest, context: Context
    ) -> host_pb2.AttachGuestResponse:
        """Plug the memory door into a domain; with dry_run, only look for obstacles."""
        attaching = partial(attach, self._registry, self._attached, request)
        return await self._once("AttachGuest", request.command, attaching, context)

    async def DetachGuest(
        self, request: host_pb2.DetachGuestRequest, context: Context
    ) -> host_pb2.DetachGuestResponse:
        """Unplug the memory door from an attached domain; return the closed books."""
        detaching = partial(detach, self._registry, self._attached, request)
        return await self._once("DetachGuest", request.command, detaching, context)

    async def RunStep(
        self, request: host_pb2.RunStepRequest, context: Context
    ) -> host_pb2.RunStepResponse:
        """Run one workload step on one guest."""

        async def run() -> host_pb2.RunStepResponse:
            guest = self._registry.get(request.guest_name)
            done = await guest.sessions.run_step(
                partial(command_of, request), command_id=number_of(request.command)
            )
            # After the step `verify`, audit: the samples that follow it must have exact books.
            if request.verify:
                await guest.audits.ledger()
            return response_of(request, done, time.time_ns() // 1000)

        return await self._once("RunStep", request.command, run, context)

    async def Settle(
        self, request: host_pb2.SettleRequest, context: Context
    ) -> host_pb2.SettleResponse:
        """Have one guest hint now, and return when all that it may hint is acknowledged.

        Under a peer, wait until no memory leaves the RAM file for some seconds.
        """
        timeout_s = request.timeout_ms / 1000 or _DEFAULT_SETTLE_S
        try:
            guest = self._registry.get(request.guest_name)
            async with asyncio.timeout(timeout_s):
                settled = await guest.settle()
            ledger = await guest.audits.ledger()
            # Save before the answer is sent: an experiment computes with this ledger, and a restart
            # of the host agent must not undo a part of the ledger.
            await guest.saver.save(guest)
            return host_pb2.SettleResponse(
                batches=settled.batches,
                hinted_bytes=settled.hinted_pages * PAGE_BYTES,
                ledger=ledger,
            )
        except TimeoutError:
            await abort(
                context,
                OutcomeUnknown(f"guest {request.guest_name} did not settle within {timeout_s:g} s"),
            )
        except HintfleetError as error:
            await abort(context, error)
        finally:
            self._answered += 1

    async def PauseHinting(
        self, request: host_pb2.PauseHintingRequest, context: Context
    ) -> host_pb2.PauseHintingResponse:
        """Have one guest hint nothing for a time; 0 ends the pause."""
        try:
            left_s = pause_hinting(self._registry.get(request.name), request.for_ms / 1000)
            return host_pb2.PauseHintingResponse(left_ms=math.ceil(left_s * 1000))
        except HintfleetError as error:
            await abort(context, error)
        finally:
            self._answered += 1

    async def Watch(
        self, request: host_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[host_pb2.SampleSet]:
        """Stream samples of a trial's guests; if it has none yet, once those of all other trials
        are gone that nobody watches. When the trial's last Watch ends, its guests are ended, unless
        this host agent is ending itself."""
        if not request.trial_id:
            await abort(context, InvalidInput("Watch needs a trial"))
        await _check_period(request.period_ms, context)
        self._registry.trials.open_watch(request.trial_id)
        try:
            if not any(guest.trial_id == request.trial_id for guest in self._registry.guests):
                await self._registry.room_for(request.trial_id)
            async for samples in self._samples(
                request.period_ms,
                lambda: [g for g in self._registry.guests if g.trial_id == request.trial_id],
            ):
                yield samples
        finally:
            self._registry.trials.close_watch(request.trial_id)

    async def WatchHost(
        self, request: host_pb2.WatchHostRequest, context: Context
    ) -> AsyncIterator[host_pb2.SampleSet]:
        """Stream samples of all guests of this host."""
        await _check_period(request.period_ms, context)
        async for samples in self._samples(request.period_ms, lambda: self._registry.guests):
            yield samples

    async def _samples(
        self, period_ms: int, guests: Callable[[], Sequence[Guest]]
    ) -> AsyncIterator[host_pb2.SampleSet]:
        """Make one set of samples of these guests in each period; yield the sets that must be sent
        (`SampleFilter`)."""
        period_s = period_ms / 1000
        sample_filter, answered = SampleFilter(), self._answered
        next_s = time.monotonic()
        # The first set is made at once. If the period is a second or more, the second set is made
        # at the next common wake time, and each later one a period after the one before.
        if period_s >= WAKE_S:
            next_s = next_wake_s(next_s) - period_s
        while True:
            answered, before = self._answered, answered
            current = sample_set(guests(), self._budget, self._registry.observing)
            for samples in sample_filter.to_send(current, commanded=answered != before):
                yield samples
            # If a set took longer than the period, those that were due meanwhile are left out.
            next_s = max(next_s + period_s, time.monotonic())
            await sleep_until(next_s)

    async def _once(
        self,
        name: str,
        command: host_pb2.CommandId,
        do: Callable[[], Awaitable[_T]],
        context: Context,
    ) -> _T:
        try:
            return await self._registry.commands.once(command, do)
        except HintfleetError as error:
            about = {"command": name, "trial": command.trial_id, "reason": error.message}
            _log.warning("command failed", extra=fields(**about))
            await abort(context, error)
        finally:
            self._answered += 1


async def _check_period(period_ms: int, context: Context) -> None:
    """Abort the call if it asks for samples more often than allowed."""
    if period_ms < SHORTEST_SAMPLE_PERIOD_MS:
        await abort(
            context,
            InvalidInput(f"samples need a period of at least {SHORTEST_SAMPLE_PERIOD_MS} ms"),
        )

"""The control API, through which an orchestrator uses this host."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from hintfleet import __version__
from hintfleet.errors import HintfleetError, InvalidInput, OutcomeUnknown
from hintfleet.logs import fields
from hintfleet.settings import SHORTEST_SAMPLE_PERIOD_MS
from hintfleet.system.machine_limits import processors
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2, host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceServicer
from host_agent.api.attaching import attach, detach
from host_agent.api.grpc_calls import Context, abort
from host_agent.api.sampling import SampleFilter, sample_set
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
        memory_budget_bytes: int,
        attached: AttachedDriver,
    ) -> None:
        self._registry = registry
        self._attached = attached
        self._name = name
        self._memory_budget_bytes = memory_budget_bytes
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
            memory_budget_bytes=self._memory_budget_bytes,
            drivers=states,
            cpu_count=max(1, int(processors().value)),
            provisioned_bytes=sum(g.provisioned_bytes for g in self._registry.guests),
        )

    async def CreateGuest(
        self, request: host_pb2.CreateGuestRequest, context: Context
    ) -> host_pb2.Guest:
        """Make a guest and wait until it is ready."""

        async def create() -> host_pb2.Guest:
            guest = await self._registry.create(
                request.name, request.command.trial_id, request.spec, request.uuid
            )
            return await guest.as_pb2()

        return await self._once("CreateGuest", request.command, create, context)

    async def ResizeGuest(
        self, request: host_pb2.ResizeGuestRequest, context: Context
    ) -> host_pb2.Guest:
        """Plug or unplug memory."""

        async def resized() -> host_pb2.Guest:
            guest = self._registry.get(request.name)
            await resize(guest, request.memory_bytes)
            return await guest.as_pb2()

        return await self._once("ResizeGuest", request.command, resized, context)

    async def DestroyGuest(
        self, request: host_pb2.DestroyGuestRequest, context: Context
    ) -> host_pb2.DestroyGuestResponse:
        """End a guest and close its books."""

        async def destroy() -> host_pb2.DestroyGuestResponse:
            return host_pb2.DestroyGuestResponse(ledger=await self._registry.destroy(request.name))

        return await self._once("DestroyGuest", request.command, destroy, context)

    async def ListGuests(
        self, request: host_pb2.ListGuestsRequest, context: Context
    ) -> host_pb2.ListGuestsResponse:
        """Return all guests with their books, which are audited first."""
        guests = await asyncio.gather(*(g.as_pb2() for g in self._registry.guests))
        return host_pb2.ListGuestsResponse(guests=guests)

    async def ListDomains(
        self, request: host_pb2.ListDomainsRequest, context: Context
    ) -> host_pb2.ListDomainsResponse:
        """Return what keeps each domain of this host's libvirt from being hinted."""
        try:
            return host_pb2.ListDomainsResponse(
                domains=await in_driver_thread(self._attached.domains)
            )
        except HintfleetError as error:
            await abort(context, error)

    async def AttachGuest(
        self, request: host_pb2.AttachGuestRequest, context: Context
    ) -> host_pb2.AttachGuestResponse:
        """Plug the memory door into a domain."""
        attaching = partial(attach, self._registry, self._attached, request)
        return await self._once("AttachGuest", request.command, attaching, context)

    async def DetachGuest(
        self, request: host_pb2.DetachGuestRequest, context: Context
    ) -> host_pb2.DetachGuestResponse:
        """Take the memory door out of a domain."""
        detaching = partial(detach, self._registry, self._attached, request)
        return await self._once("DetachGuest", request.command, detaching, context)

    async def RunStep(
        self, request: host_pb2.RunStepRequest, context: Context
    ) -> host_pb2.RunStepResponse:
        """Run one workload step on one guest."""

        async def run() -> host_pb2.RunStepResponse:
            guest = self._registry.get(request.guest_name)
            done = await guest.sessions.run_step(
                lambda number: _command(request, number), command_id=_number_of(request.command)
            )
            # Audit: samples that follow a verified step must have exact books.
            if request.verify:
                await guest.audits.ledger()
            return host_pb2.RunStepResponse(
                changed_bytes=done.changed_bytes,
                held_bytes=done.held_bytes,
                verified_pages=done.verified_pages,
                wrong_pages=done.wrong_pages,
                duration_us=done.duration_us,
                done_at_unix_us=time.time_ns() // 1000,
            )

        return await self._once("RunStep", request.command, run, context)

    async def Settle(
        self, request: host_pb2.SettleRequest, context: Context
    ) -> host_pb2.SettleResponse:
        """Let one guest hint now, and return when all that can be reclaimed is reclaimed."""
        timeout_s = request.timeout_ms / 1000 or _DEFAULT_SETTLE_S
        try:
            guest = self._registry.get(request.guest_name)
            async with asyncio.timeout(timeout_s):
                settled = await guest.settle()
            ledger = await guest.audits.ledger()
            # Saved before it is answered: an experiment computes with this ledger, and a restart
            # of the host agent must not undo a part of it.
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

    async def Watch(
        self, request: host_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[host_pb2.SampleSet]:
        """Stream samples of a trial's guests. The guests live as long as the stream."""
        if not request.trial_id or request.period_ms < SHORTEST_SAMPLE_PERIOD_MS:
            await abort(
                context,
                InvalidInput(
                    f"Watch needs a trial and a period of at least {SHORTEST_SAMPLE_PERIOD_MS} ms"
                ),
            )
        self._registry.open_watch(request.trial_id)
        period_s = request.period_ms / 1000
        sample_filter, answered = SampleFilter(), self._answered
        try:
            next_s = time.monotonic()
            # The first sample is sent at once; all later ones at the common wake times.
            if period_s >= WAKE_S:
                next_s = next_wake_s(next_s) - period_s
            while True:
                guests = [g for g in self._registry.guests if g.trial_id == request.trial_id]
                answered, before = self._answered, answered
                current = sample_set(guests, self._registry.observing)
                for samples in sample_filter.to_send(current, commanded=answered != before):
                    yield samples
                # After a sample that took longer than the period, the missed ones are left out.
                next_s = max(next_s + period_s, time.monotonic())
                await sleep_until(next_s)
        finally:
            self._registry.close_watch(request.trial_id)

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


def _number_of(command: host_pb2.CommandId) -> int:
    """Derive the id under which a guest's workload gets a command: the same for each retry; 0 if
    the command has no sequence number, and a new id is chosen later."""
    if not command.sequence:
        return 0
    # A hash, not a counter: a retry may come to another host agent, and must get the same id, so
    # that the workload answers from memory instead of doing the step twice.
    digest = hashlib.blake2b(command.SerializeToString(deterministic=True), digest_size=8)
    return int.from_bytes(digest.digest())


def _command(request: host_pb2.RunStepRequest, number: int) -> hinting_pb2.WorkloadCommand:
    command = hinting_pb2.WorkloadCommand(command_id=number)
    step = request.WhichOneof("step")
    if step == "allocate_bytes":
        command.allocate.size_bytes = request.allocate_bytes
        command.allocate.seed = request.seed
    elif step == "free_bytes":
        command.free.size_bytes = request.free_bytes
        command.free.seed = request.seed
    elif step == "verify":
        command.verify.SetInParent()
    else:
        raise InvalidInput("RunStep has no step")
    return command

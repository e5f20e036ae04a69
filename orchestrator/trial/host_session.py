"""Reaches, uses and releases one host under test, in the process of its actor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from hintfleet.errors import OutcomeUnknown, Refused, TransientError
from hintfleet.net.tls import Tls
from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.trial.block_runner import check_guests
from orchestrator.trial.guest_spec import driver_pb2
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.host_place import HostPlace
from orchestrator.trial.host_process import HostProcess
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import Event, HostDone, HostSamples
from orchestrator.trial.runner import run_host_task


class HostSession:
    """Owns the client of a host agent and, for a logical host, the host agent's process."""

    def __init__(self, place: HostPlace, folder: Path, turns: asyncio.Semaphore) -> None:
        """:param folder: for the files of a logical host; `HostProcess` makes and removes it.
        :param turns: how many hosts may be opened at once.
        """
        self._folder = folder
        self._turns = turns
        self._place = place
        self._process: HostProcess | None = None
        self._client: HostClient | None = None

    async def open(self, wait: bool = False) -> None:
        """Reach the host, and check that it can run the guests.

        After a failure the session is closed, and a logical host that was started is stopped.

        :param wait: wait for a host agent that does not listen yet.
        :raises Refused: the host cannot run the guests, or has not those of a switchback; says why
            and what to do.
        :raises InvalidInput: the address or the TLS folder cannot be used.
        :raises TransientError: the host cannot be reached.
        :raises OutcomeUnknown: the host agent did not answer before the deadline.
        """
        try:
            async with self._turns:
                await self._open(wait)
        except BaseException:
            await self.close()
            raise

    async def _open(self, wait: bool) -> None:
        place = self._place
        address = place.address
        if place.logical is not None:
            self._process = await HostProcess.start(place.logical, self._folder)
            address = self._process.address
        tls = Tls.read(place.tls_folder, server=False) if place.tls_folder else None
        self._client = HostClient(address, place.timeouts, tls)
        if place.switchback is None:
            self._check(await self._client.get_host(driver_pb2(place.driver), wait))
            return
        # Only a check that the host agent answers: whether it can make guests does not matter.
        await self._client.get_host(host_pb2.ATTACHED, wait)
        listed = await self._client.list_guests()
        check_guests(place.name, place.driver, place.switchback.guests, listed)

    def _check(self, host: host_pb2.Host) -> None:
        place = self._place
        if host.memory_budget_bytes < place.memory_needed_bytes:
            raise Refused(
                f"{place.name}: its memory budget of {format_size(host.memory_budget_bytes)} is "
                f"less than one guest ({format_size(place.memory_needed_bytes)})",
                hint="raise hintfleet-host --memory-budget or the memory limit of its cgroup, or "
                "use smaller guests",
            )
        for state in host.drivers:
            if state.driver == driver_pb2(place.driver):
                if not state.usable:
                    raise Refused(
                        f"{place.name} cannot run {place.driver} guests: {state.detail}",
                        hint="`hintfleet doctor` says what is missing",
                    )
                return
        raise Refused(f"{place.name} has no {place.driver} driver")

    async def run(self, task: HostTask) -> AsyncIterator[Event | HostSamples]:
        """Run this host's part of a trial; yield its events and samples.

        If the host was lost in an earlier trial, first start its logical host again, or wait
        until the host agent at its address can be reached.

        :raises TransientError: the lost host cannot be reached again.
        :raises StableError: the host cannot run the trial.
        """
        if self._process is not None and not self._process.running:
            await self.close()
        if self._client is None:
            await self._reopen()
        lost = False
        async for record in run_host_task(self._opened(), task):
            lost = isinstance(record, HostDone) and record.lost
            yield record
        if lost:  # close the session, so that the next `run` opens it again
            await self.close()

    async def _reopen(self) -> None:
        try:
            await self.open(wait=True)
        except (TransientError, OutcomeUnknown) as error:
            raise TransientError(
                f"{self._place.name} was lost, and did not come back within "
                f"{self._place.timeouts.connect_s:g} s: {error.message}",
                hint=error.hint,
            ) from error

    def _opened(self) -> HostClient:
        if self._client is None:
            raise RuntimeError("the session is not open")
        return self._client

    async def close(self) -> None:
        """Close the client, so that the host agent ends the trial's guests; stop a logical host.

        May be called twice.
        """
        # Set to None before anything is closed: a second call, or one after an error here, must
        # not close the same things again.
        client, self._client = self._client, None
        process, self._process = self._process, None
        if client is not None:
            await client.aclose()
        if process is not None:
            await process.stop()

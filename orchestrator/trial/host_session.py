"""One host under test, as the actor that stands for it sees it: reached, used, let go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import OutcomeUnknown, Refused, TransientError
from hintfleet.net.tls import Tls
from hintfleet.settings import Driver
from hintfleet.system.owned_folders import OwnedFolder
from hintfleet.units import format_size
from hintfleet.v1 import host_pb2
from orchestrator.machine import runtime_dirs
from orchestrator.spec.model import Timeouts
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.host_process import HostProcess, LogicalHost
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import HostDone, Record
from orchestrator.trial.runner import driver_pb2, run_host_task


@dataclass(frozen=True, kw_only=True)
class HostPlace:
    """Where a host is: a logical one to start, or the address of its host agent.

    :ivar memory_needed_bytes: the largest guest that it has to hold.
    :ivar tls_folder: the operator's, on the node that this is used on, for its key does not
        travel; empty for plain text.
    """

    name: str
    driver: Driver
    memory_needed_bytes: int
    timeouts: Timeouts
    logical: LogicalHost | None = None
    address: str = ""
    tls_folder: str = ""


class HostSession:
    """Holds a host agent's client, and its process where it is a logical host."""

    def __init__(self, place: HostPlace, folder: Path | None) -> None:
        """:param folder: for a logical host's files; None for one that is made here."""
        self._folder = folder
        self._made: OwnedFolder | None = None
        self._place = place
        self._process: HostProcess | None = None
        self._client: HostClient | None = None

    async def open(self, wait: bool = False) -> None:
        """Reach the host, and check that it can run what is asked.

        :param wait: for a host agent that does not answer at once.
        :raises Refused: it cannot; says why and what to do.
        :raises TransientError: it cannot be reached. After a failure nothing is left.
        """
        try:
            await self._open(wait)
        except BaseException:
            await self.close()
            raise

    async def _open(self, wait: bool) -> None:
        place = self._place
        address = place.address
        if place.logical is not None:
            self._process = await HostProcess.start(place.logical, self._host_folder())
            address = self._process.address
        tls = Tls.read(place.tls_folder, server=False) if place.tls_folder else None
        self._client = HostClient(address, place.timeouts, tls)
        self._check(await self._client.get_host(driver_pb2(place.driver), wait))

    def _host_folder(self) -> Path:
        if self._folder is not None:
            return self._folder
        self._made = self._made or runtime_dirs().make()
        return self._made.path / self._place.name

    def _check(self, host: host_pb2.Host) -> None:
        place = self._place
        if host.memory_budget_bytes < place.memory_needed_bytes:
            raise Refused(
                f"{place.name}: its memory budget of {format_size(host.memory_budget_bytes)} is "
                f"less than one guest ({format_size(place.memory_needed_bytes)})",
                hint="hintfleet-host --memory-budget, a higher memory limit of the cgroup that it "
                "runs in, or smaller guests",
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

    async def run(self, task: HostTask) -> AsyncIterator[Record]:
        """This host's part of a trial. A host that was lost before is reached anew:
        started again, or waited for.

        :raises TransientError: it did not come back.
        """
        if self._process is not None and not self._process.running:
            await self.close()
        if self._client is None:
            await self._reopen()
        lost = False
        async for record in run_host_task(self._opened(), task):
            lost = isinstance(record, HostDone) and record.lost
            yield record
        if lost:
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
        """Let go: guests end with their watch, a logical host with its guests."""
        client, self._client = self._client, None
        process, self._process = self._process, None
        if client is not None:
            await client.close()
        if process is not None:
            await process.stop()
        if self._made is not None:
            self._made.remove()
            self._made = None

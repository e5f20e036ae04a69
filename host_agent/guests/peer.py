"""Runs a peer of hinting on a guest. Peers are the methods that take memory out of a guest without
hints: free page reporting and the balloon, both by QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from hintfleet.errors import GuestLost, HintfleetError
from hintfleet.v1 import host_pb2
from host_agent.guests.balloon import Rule
from host_agent.guests.balloon_loop import follow, wait_reporting
from host_agent.guests.driver import RunningGuest

PEERS = frozenset({host_pb2.REPORTING, host_pb2.BALLOON})


class Peer:
    """Moves the balloon of one guest, or waits until its free page reporting works (QEMU does the
    rest); does nothing under other methods.

    :ivar works: whether the peer was found to work, as far as that can be found out; true from the
        start under other methods.
    """

    def __init__(self, spec: host_pb2.GuestSpec) -> None:
        self.works = spec.method not in PEERS
        self._spec = spec
        self._task: asyncio.Task[None] | None = None

    def start(
        self,
        running: RunningGuest,
        booted: asyncio.Event,
        *,
        on_works: Callable[[], None],
        has_moved: Callable[[], bool],
        failed: Callable[[str], None],
        begin: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        """Start a task that runs the peer once `booted` is set.

        :param on_works: called whenever the peer is found to work; `works` is true then.
        :param has_moved: returns whether the guest's resident memory has moved by 1 MiB or more
            since it last returned true.
        :param failed: called with the reason when the method cannot work, or does not any more. Not
            called when the guest is gone.
        :param begin: starts the task, as LastingTasks.begin does.
        """
        if self.works:
            return

        def works() -> None:
            self.works = True
            on_works()

        async def run() -> None:
            # A guest that still boots has no balloon driver yet, and would count as silent.
            await booted.wait()
            try:
                if running.reporting is not None:
                    await wait_reporting(running.reporting)
                    works()
                if running.balloon is not None:
                    await follow(running.balloon, Rule.of(self._spec), works, has_moved)
            except GuestLost:  # the driver calls `on_gone` with the reason
                pass
            except HintfleetError as error:
                name = host_pb2.Method.Name(self._spec.method).lower()
                failed(f"method {name} cannot work: {error}")

        self._task = begin(run())

    async def stop(self) -> None:
        """Cancel the task, and wait until it has ended. A call to the hypervisor that is running in
        a thread is not waited for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

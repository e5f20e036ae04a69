"""The methods that take memory out of a guest without us: QEMU's reporting, and the balloon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hintfleet.errors import GuestLost, HintfleetError
from hintfleet.v1 import host_pb2
from host_agent.guests.balloon import Rule
from host_agent.guests.balloon_loop import follow, wait_reporting
from host_agent.guests.driver import RunningGuest

PEERS = frozenset({host_pb2.REPORTING, host_pb2.BALLOON})


class Peer:
    """A peer at work on one guest; without one, there is nothing to be waited for.

    :ivar works: whether the guest has been seen to have what its method needs.
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
        seen: Callable[[], None],
        stirred: Callable[[], bool],
        failed: Callable[[str], None],
    ) -> None:
        """Begin, once the guest has booted: one that boots is left alone.

        :param seen: called when `works` has become true.
        :param stirred: whether the guest's resident memory has moved since it was last called.
        :param failed: told why the method cannot work.
        """
        if self.works:
            return

        def works() -> None:
            self.works = True
            seen()

        async def run() -> None:
            await booted.wait()
            try:
                if running.reporting is not None:
                    await wait_reporting(running.reporting)
                    works()
                if running.balloon is not None:
                    await follow(running.balloon, Rule.of(self._spec), works, stirred)
            except GuestLost:  # the driver says why
                pass
            except HintfleetError as error:
                name = host_pb2.Method.Name(self._spec.method).lower()
                failed(f"method {name} cannot work: {error}")

        self._task = asyncio.create_task(run())

    async def stop(self) -> None:
        """End what was begun; a call into the driver is waited for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

"""The injectors of faults in embedded guests, virtual machines and their host agent: small classes
that begin and end a fault. Faults that only attached guests have are injected by attached.py."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2, host_pb2
from tests.support.relay import Link
from tests.torture.guest import Victim
from tests.torture.host import HostAgent
from tests.torture.impostors import hello_in, pretend, replay
from tests.torture.plan import Fault, Kind

if TYPE_CHECKING:  # HostServiceAsyncStub is in the .pyi file only
    from hintfleet.v1.host_pb2_grpc import HostServiceAsyncStub

# How often, once a second, a domain is resumed while libvirtd does not answer.
_RESUME_TRIES = 120
_SECTION_BYTES = 128 * MIB
_DEADLINE_S = 60.0
_LONGEST_DELAY_S = 0.05


class Missed(Exception):
    """The fault was not injected, as far as is known: it had no target, was refused, or failed."""


class Injector(Protocol):
    """One fault. `end` is called once after `begin`, also if `begin` raised Missed, or if the run
    was interrupted before `begin` was called."""

    lasts: bool
    """Whether `end` is called only `hold_s` after `begin`; else it is called at once."""

    def begin(self) -> None:
        """Inject the fault. Must not wait, because the relay calls this before it passes on data.

        :raises Missed: nothing was done.
        """

    async def end(self) -> None:
        """Undo what can be undone, and wait for the work that `begin` has started.

        :raises Missed: the fault was not injected, as far as is known, or could not be undone.
        """


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an injector may need: the victim, the host agent, and a client of the host agent."""

    victim: Victim
    host: HostAgent
    stub: HostServiceAsyncStub
    fault: Fault
    refused: Callable[[], None]
    """Called when the host has refused an impostor."""
    problem: Callable[[str], None]
    """Reports what must not happen."""


class Kill:
    """kill -9 of the guest's process, which is doomed from then on."""

    lasts = False

    def __init__(self, scene: Scene) -> None:
        self._victim = scene.victim

    def begin(self) -> None:
        self._victim.doomed = True
        _signal(self._victim.signal, signal.SIGKILL)

    async def end(self) -> None:
        """Do nothing: the guest stays dead."""


class Suspend:
    """SIGSTOP of a process for a while: of a guest, or of the host agent."""

    lasts = True

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send

    def begin(self) -> None:
        _signal(self._send, signal.SIGSTOP)

    async def end(self) -> None:
        with contextlib.suppress(Missed):
            _signal(self._send, signal.SIGCONT)


class Cut:
    """Reset every connection of the guest."""

    lasts = False

    def __init__(self, scene: Scene) -> None:
        self._victim = scene.victim

    def begin(self) -> None:
        for link in _links(self._victim):
            link.cut()

    async def end(self) -> None:
        """Do nothing: the guest connects again by itself."""


class Stall:
    """Let nothing pass on the guest's connections for a while; neither end is notified."""

    lasts = True

    def __init__(self, scene: Scene) -> None:
        self._victim = scene.victim
        self._stalled: list[Link] = []

    def begin(self) -> None:
        self._stalled = _links(self._victim)
        for link in self._stalled:
            link.stall()

    async def end(self) -> None:
        for link in self._stalled:
            link.resume()


class Delay:
    """Delay each piece of data on the guest's connections for a while, in both directions."""

    lasts = True

    def __init__(self, scene: Scene) -> None:
        self._victim = scene.victim
        self._delay_s = min(scene.fault.hold_s / 4, _LONGEST_DELAY_S)
        self._delayed: list[Link] = []

    def begin(self) -> None:
        self._delayed = _links(self._victim)
        for link in self._delayed:
            link.delay_s = self._delay_s

    async def end(self) -> None:
        for link in self._delayed:
            link.delay_s = 0.0


class Task:
    """A fault that takes time: it begins as a task, which is awaited at the end."""

    lasts = False

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(work)

    async def end(self) -> None:
        if self._task is not None:
            await self._task


class InThread(Task):
    """A fault that a blocking function injects. It is missed if libvirt fails."""

    def __init__(self, inject: Callable[[Scene], None], scene: Scene) -> None:
        super().__init__()
        self._inject = inject
        self._scene = scene

    def begin(self) -> None:
        self._start(asyncio.to_thread(self._run))

    def _run(self) -> None:
        with missed_if_libvirt_fails():
            self._inject(self._scene)


class Impostor(Task):
    """A fault in which another client acts as the guest."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._scene = scene

    async def _let(self, speak: Coroutine[Any, Any, None]) -> None:
        try:
            await speak
        except grpc.RpcError:
            self._scene.refused()
        except OSError as error:  # the host agent is dead, or reset the connection
            raise Missed from error

    @property
    def _hello(self) -> hinting_pb2.Hello:
        victim = self._scene.victim
        for link in [*victim.links, *victim.earlier_links]:
            if (hello := hello_in(bytes(link.recorded))) is not None:
                return hello
        raise Missed


class Replay(Impostor):
    """Send on a new connection what the guest sent first (64 KiB at most) on another one, open or
    closed: the one with the longest record."""

    def begin(self) -> None:
        victim, upstream = self._scene.victim, self._scene.victim.relay.upstream
        links = [*victim.earlier_links, *victim.links]
        if not links or upstream is None:
            raise Missed
        said = bytes(max(links, key=lambda link: len(link.recorded)).recorded)
        self._start(self._let(replay(upstream, said, self._scene.fault.hold_s)))


class SecondAgent(Impostor):
    """Send a copy of the guest's Hello, and keep that session open for a while."""

    def begin(self) -> None:
        upstream = self._scene.victim.relay.upstream
        if upstream is None:
            raise Missed
        hello = self._changed(self._hello)
        self._start(self._let(pretend(upstream, hello, self._scene.fault.hold_s)))

    def _changed(self, hello: hinting_pb2.Hello) -> hinting_pb2.Hello:
        return hello


class OtherBoot(SecondAgent):
    """Like SecondAgent, but with another boot id, on which the host agent does not act."""

    def _changed(self, hello: hinting_pb2.Hello) -> hinting_pb2.Hello:
        hello.boot_id = str(uuid.uuid4())
        return hello


class SuspendDomain(Task):
    """`virsh suspend`: the guest's CPUs stop, QEMU does not."""

    lasts = True

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._victim = scene.victim

    def begin(self) -> None:
        self._start(asyncio.to_thread(lambda: self._victim.domain.suspend()))

    async def end(self) -> None:
        try:
            with missed_if_libvirt_fails():
                await super().end()
        finally:
            # Also after an error: libvirtd may have been killed when it had suspended the domain.
            for _ in range(_RESUME_TRIES):
                if await asyncio.to_thread(self._goes_on):
                    break
                await asyncio.sleep(1)

    def _goes_on(self) -> bool:
        """Resume the domain if it is suspended; return False if libvirtd does not answer."""
        import libvirt

        try:
            domain = self._victim.domain
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        except libvirt.libvirtError as error:
            return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)
        return True


class Resize(Task):
    """Plug memory if none is plugged; else unplug it, unless the guest refuses."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._stub = scene.stub
        self._victim = scene.victim

    def begin(self) -> None:
        self._start(self._resize())

    async def _resize(self) -> None:
        victim = self._victim
        wanted_bytes = victim.spec.memory_bytes + _SECTION_BYTES * (not victim.is_grown)
        request = host_pb2.ResizeGuestRequest(name=victim.name, memory_bytes=wanted_bytes)
        try:
            await self._stub.ResizeGuest(request, timeout=_DEADLINE_S)
        except grpc.RpcError as error:
            raise Missed from error
        victim.is_grown = not victim.is_grown


class KillHost:
    """kill -9 of the host agent; its successor is started at the end."""

    lasts = True

    def __init__(self, scene: Scene) -> None:
        self._host = scene.host
        self._killed = False

    def begin(self) -> None:
        _signal(lambda _: self._host.kill(), signal.SIGKILL)
        self._killed = True

    async def end(self) -> None:
        if self._killed:
            await self._host.wait_dead()
            await self._host.start()


def _reset(scene: Scene) -> None:
    """`virsh reset`. It ends a domain that hintfleet made, and frees its RAM."""
    scene.victim.doomed = True
    scene.victim.domain.reset()


def _signal(send: Callable[[int], None], number: int) -> None:
    try:
        send(number)
    except ProcessLookupError as error:
        raise Missed from error


def _links(victim: Victim) -> list[Link]:
    if not victim.links:
        raise Missed
    return victim.links


@contextlib.contextmanager
def missed_if_libvirt_fails() -> Iterator[None]:
    import libvirt

    try:
        yield
    except libvirt.libvirtError as error:
        raise Missed from error


EMBEDDED: Mapping[Kind, Callable[[Scene], Injector]] = {
    Kind.GUEST_KILLED: Kill,
    Kind.GUEST_SUSPENDED: lambda scene: Suspend(scene.victim.signal),
    Kind.LINK_CUT: Cut,
    Kind.LINK_STALLED: Stall,
    Kind.LINK_DELAYED: Delay,
    Kind.SESSION_REPLAYED: Replay,
    Kind.SECOND_AGENT: SecondAgent,
    Kind.BOOT_ID_CHANGED: OtherBoot,
    Kind.MEMORY_RESIZED: Resize,
    Kind.HOST_AGENT_SUSPENDED: lambda scene: Suspend(scene.host.signal),
    Kind.HOST_AGENT_KILLED: KillHost,
}
"""The injector of each kind for embedded guests."""

REAL: Mapping[Kind, Callable[[Scene], Injector]] = {
    **EMBEDDED,
    Kind.GUEST_RESET: partial(InThread, _reset),
    Kind.GUEST_SUSPENDED: SuspendDomain,
}
"""The injector of each kind for guests of driver libvirt. Kind.AGENT_KILLED and Kind.AGENT_STOPPED
have none: agents in the guest end themselves (in_guest/sitecustomize.py)."""

"""The setting for torture of attached guests: domains that somebody else has made
(tests/support/foreign.py). Besides other faults, they are reset in five ways, ended and started
again, and detached; their memory door is unplugged, and their libvirtd is killed. With `short`,
they are reset in two of these ways, and not ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from hintfleet.errors import HintfleetError, OutcomeUnknown
from hintfleet.units import KIB, MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.devices import detach, unplug_door
from host_agent.guests.libvirt.dimm_xml import dimm_xml, dimms_of
from tests.support.foreign import KMOD, Extra, ForeignDomain, foreign_domain
from tests.support.own_libvirt import OwnLibvirt, own_libvirt
from tests.support.relay import Relay
from tests.torture import injectors
from tests.torture.guest import Victim
from tests.torture.injectors import Injector, InThread, Missed, Scene, Task
from tests.torture.place import Deadlines, Place
from tests.torture.plan import Kind, Pace
from tests.torture.real import RealVictim, built_image
from tests.torture.run import Setting

_HERE = Path(__file__).parent / "in_guest"
_WORKLOAD = "hintfleet-workload.service"
_STRESS = "128M"
_DIMM_BYTES = 128 * MIB
_KEPT_TRIES = 20
_START_TRIES = 60

# The agent is started again however it has ended, and the console shows how it ended. Loading the
# kernel module may fail: only isolator kmod needs it.
_AGENT_ALWAYS = f"""
[Unit]
StartLimitIntervalSec=0
[Service]
Restart=always
RestartPreventExitStatus=
DeviceAllow=/dev/console rw
ExecStartPre=-+/sbin/insmod {KMOD}
ExecStopPost=
ExecStopPost=+/bin/sh /usr/local/lib/hintfleet-ended
"""
_ENDED = """
case $EXIT_STATUS in
    KILL) echo "the agent was killed (status 137)" ;;
    0) echo "the agent was stopped" ;;
    *) echo "the agent ended: $EXIT_CODE $EXIT_STATUS" ;;
esac >/dev/console
"""
_WORKLOAD_UNIT = """
[Unit]
ConditionPathExists=/etc/hintfleet/guest.json
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/bin/hintfleet-guest --workload-only
Restart=always
RestartSec=1
StandardOutput=file:/dev/console
[Install]
WantedBy=multi-user.target
"""

_KINDS: Mapping[Kind, int] = {
    Kind.LINK_CUT: 24,
    Kind.LINK_STALLED: 14,
    Kind.LINK_DELAYED: 8,
    Kind.SESSION_REPLAYED: 14,
    Kind.SECOND_AGENT: 10,
    Kind.BOOT_ID_CHANGED: 4,
    Kind.GUEST_SUSPENDED: 16,
    Kind.SAVE_REFUSED: 6,
    Kind.MEMORY_RESIZED: 6,
    Kind.DOOR_UNPLUGGED: 3,
    Kind.DETACHED: 3,
}
_RESETS = (
    Kind.GUEST_RESET,
    Kind.GUEST_REBOOTED,
    Kind.GUEST_REBOOTED_AT_ONCE,
    Kind.GUEST_SYSRQ_B,
    Kind.GUEST_PANICKED,
    Kind.DOMAIN_ENDED,
)
_COMMANDS: Mapping[Kind, str] = {
    Kind.GUEST_REBOOTED: "systemctl reboot",
    Kind.GUEST_REBOOTED_AT_ONCE: "systemctl reboot --force --force",
    Kind.GUEST_SYSRQ_B: "echo b >/proc/sysrq-trigger",
    Kind.GUEST_PANICKED: "echo c >/proc/sysrq-trigger",
}


@dataclass(kw_only=True)
class AttachedVictim(RealVictim):
    """A domain of somebody else that is attached, or waits to be attached again; faults hit it."""

    foreign: ForeignDomain

    def _console(self) -> str:
        return self.foreign.console.read_text(errors="replace")


class AttachedPlace(Place):
    """Attaches its domain, and attaches it again whenever it is not attached any more."""

    pause_s = 1.0  # a domain that boots cannot be attached yet

    def __init__(self, *, domains: Mapping[str, ForeignDomain], **settings: Any) -> None:
        super().__init__(**settings)
        self._foreign = domains[self.name]
        self._gone_since_s = time.monotonic()

    def _is_here(self, name: str) -> bool:
        return name == self.name

    async def _begin(self) -> host_pb2.Guest:
        attached = await self._stub.AttachGuest(
            host_pb2.AttachGuestRequest(
                domain=self.name, hinting=self.spec.hinting, through_guest_agent=True
            ),
            timeout=self._deadlines.create_s,
            wait_for_ready=True,
        )
        await asyncio.to_thread(self._start_workload)
        return attached.guest

    def _start_workload(self) -> None:
        # The workload reads the token only when it starts, and each AttachGuest makes a new token.
        with contextlib.suppress(AssertionError, _libvirt_error()):
            self._foreign.run("/usr/bin/systemctl", "restart", _WORKLOAD)

    def _not_made(self, error: grpc.RpcError | ProcessLookupError) -> None:
        """Report a problem if no attempt to attach the domain has succeeded for `silence_s`."""
        gone_s = time.monotonic() - self._gone_since_s
        if gone_s > self._deadlines.silence_s:
            self._gone_since_s = time.monotonic()
            self._report.problem(
                f"domain {self.name} cannot be attached for {gone_s:.0f} s: {error}"
            )

    async def _lost(self, victim: Victim) -> None:
        self._gone_since_s = time.monotonic()
        with contextlib.suppress(_libvirt_error()):
            # `finish` may have suspended the domain.
            await asyncio.to_thread(lambda: victim.domain.resume())
        await super()._lost(victim)

    async def _gone(self, victim: Victim, said: str) -> None:
        """Handle a step's error which says that the guest is gone. If the guest is not doomed, and
        waits for its domain or runs again, the step only has no answer (`_silent`); else it is
        lost."""
        if not victim.doomed and await self._is_kept():
            await self._silent(victim, said)
        else:
            await super()._gone(victim, said)

    async def _is_kept(self) -> bool:
        """Return whether the guest waits for its domain to start, or runs again; False if the host
        agent does not have it, or does not say so in _KEPT_TRIES tries."""
        for _ in range(_KEPT_TRIES):
            with contextlib.suppress(grpc.RpcError):
                listed = await self._stub.ListGuests(
                    host_pb2.ListGuestsRequest(), timeout=self._deadlines.step_s
                )
                guests = [guest for guest in listed.guests if guest.name == self.name]
                if not guests:
                    return False
                waits = guests[0].not_hinting_because.startswith("it is attached again")
                if waits or guests[0].pid:
                    return True
            await asyncio.sleep(self.pause_s)
        return False

    async def _destroy(self, name: str) -> None:
        # Try through the QEMU guest agent, then without it: a booting guest has none yet.
        for through in (True, False):
            request = host_pb2.DetachGuestRequest(name=name, through_guest_agent=through)
            with contextlib.suppress(grpc.RpcError):
                await self._stub.DetachGuest(
                    request, timeout=self._deadlines.step_s, wait_for_ready=True
                )
                return


def _run_in_guest(command: str, scene: Scene) -> None:
    """Start a command in the guest that makes it boot again; do not wait for the boot."""
    assert isinstance(scene.victim, AttachedVictim)
    scene.victim.foreign.spawn("/bin/sh", "-c", command)


def _reset(scene: Scene) -> None:
    """`virsh reset`: the domain boots again in the same memory."""
    scene.victim.domain.reset()


def _end_domain(scene: Scene) -> None:
    """`virsh destroy` and `virsh start`: the host agent attaches the domain again by itself."""
    scene.victim.domain.destroy()
    _boot(scene)


def _boot(scene: Scene) -> None:
    """Have the domain run, from its disk and not from a saved state."""
    import libvirt

    for _ in range(_START_TRIES):  # libvirtd may be killed meanwhile
        with contextlib.suppress(libvirt.libvirtError):
            if scene.victim.domain.isActive():
                return
            scene.victim.domain.createWithFlags(libvirt.VIR_DOMAIN_START_FORCE_BOOT)
        time.sleep(1)
    scene.problem(f"domain {scene.victim.name} cannot be started")


def _unplug_door(scene: Scene) -> None:
    """Take the memory door out of the domain, as the operator of the domain may do."""
    scene.victim.doomed = True
    try:
        unplug_door(scene.victim.domain)
    except HintfleetError as error:  # a guest that boots releases no device
        # After OutcomeUnknown, the guest may still release the door.
        scene.victim.doomed = isinstance(error, OutcomeUnknown)
        raise Missed from error


def _resize_domain(scene: Scene) -> None:
    """Plug a DIMM, or unplug the one that is plugged, as an operator may."""
    domain = scene.victim.domain
    if not (plugged := dimms_of(domain.XMLDesc())):
        domain.attachDevice(dimm_xml(_DIMM_BYTES, node=0))
    try:
        for dimm in plugged:
            detach(domain, dimm.alias, dimm.xml)
    except HintfleetError as error:  # a guest that uses the DIMM, or boots, keeps it
        raise Missed from error


def _save(scene: Scene) -> None:
    """`virsh managedsave`, which must be refused while the door is there."""
    domain = scene.victim.domain
    has_door = "<filesystem" in domain.XMLDesc()
    with contextlib.suppress(_libvirt_error()):
        domain.managedSave()
        if has_door:
            scene.problem(f"domain {scene.victim.name} was saved with its door")
        domain.create()
    # libvirtd may be killed meanwhile, and before 9.2 it cannot always restore what it has saved.
    _boot(scene)


class _Detach(Task):
    """`hintfleet detach`; if the fault has a lag, the guest's agent is stopped first."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self._scene = scene

    def begin(self) -> None:
        self._scene.victim.doomed = True
        self._start(self._run())

    async def _run(self) -> None:
        request = host_pb2.DetachGuestRequest(
            name=self._scene.victim.name, through_guest_agent=bool(self._scene.fault.lag_s)
        )
        try:
            await self._scene.stub.DetachGuest(request, timeout=60)
        except grpc.RpcError as error:
            # Without an answer, the domain may be detached, or be detached later.
            unknown = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            self._scene.victim.doomed = error.code() in (*unknown, grpc.StatusCode.UNKNOWN)
            raise Missed from error


def _libvirt_error() -> type[Exception]:
    import libvirt

    error: type[Exception] = libvirt.libvirtError
    return error


def _injectors(libvirt: OwnLibvirt) -> Mapping[Kind, Callable[[Scene], Injector]]:
    def restart_libvirt(_: Scene) -> None:
        libvirt.stop(signal.SIGKILL)
        libvirt.start()

    blocking: Mapping[Kind, Callable[[Scene], None]] = {
        **{kind: partial(_run_in_guest, command) for kind, command in _COMMANDS.items()},
        Kind.GUEST_RESET: _reset,
        Kind.DOMAIN_ENDED: _end_domain,
        Kind.MEMORY_RESIZED: _resize_domain,
        Kind.DOOR_UNPLUGGED: _unplug_door,
        Kind.SAVE_REFUSED: _save,
        Kind.LIBVIRT_RESTARTED: restart_libvirt,
    }
    return {
        **injectors.REAL,
        **{kind: partial(InThread, inject) for kind, inject in blocking.items()},
        Kind.DETACHED: _Detach,
    }


@contextmanager
def setting(seed: int, *, short: bool = False) -> Iterator[Setting]:
    """Yield the setting: domains under a libvirtd of the test's own, and their faults. Needs root.

    :param short: one domain with isolator hugetlb and without stress-ng, which is reset seldom,
        because it takes long to boot; else one with hugetlb and one with kmod, with stress-ng.
    """
    isolators = {"db-torture": "hugetlb"} | ({} if short else {"web-torture": "kmod"})
    with contextlib.ExitStack() as undo:
        libvirt = undo.enter_context(own_libvirt())
        extra = _extra(seed, stress=not short)
        image = built_image()
        domains = {
            name: undo.enter_context(foreign_domain(libvirt, image, name, extra))
            for name in isolators
        }
        for domain in domains.values():
            domain.wait_for_boot()
        said: dict[str, Counter[str]] = {name: Counter() for name in isolators}

        def victim_of(guest: host_pb2.Guest, relay: Relay) -> Victim:
            return AttachedVictim.of(
                guest,
                relay,
                partial(libvirt.find, guest.uuid),
                foreign=domains[guest.name],
                said=said[guest.name],
            )

        resets = _RESETS[:2] if short else _RESETS
        yield Setting(
            driver="attached",
            guests={name: _spec(domains[name], isolator) for name, isolator in isolators.items()},
            kinds={**_KINDS, **dict.fromkeys(resets, 1 if short else 3)},
            host_kinds={
                Kind.HOST_AGENT_SUSPENDED: 6,
                Kind.HOST_AGENT_KILLED: 2,
                Kind.LIBVIRT_RESTARTED: 1,
            },
            injectors=_injectors(libvirt),
            pace=Pace(pause_s=0.5, lag_s=0.02, hold_s=1.0, longest_hold_s=0 if short else 20),
            # A guest that is reset boots again, which takes minutes on a busy machine.
            deadlines=Deadlines(create_s=180, step_s=60, silence_s=900),
            advertise=lambda address: f"10.0.2.2:{address.port}",
            victim_of=victim_of,
            longest_wait_s=0.5,
            back_s=180,
            back_means_answered=True,
            busy_share=0.4,
            place=partial(AttachedPlace, domains=domains),
            host_arguments=("--libvirt-uri", libvirt.uri),
        )


def _spec(foreign: ForeignDomain, isolator: str) -> host_pb2.GuestSpec:
    return host_pb2.GuestSpec(
        driver=host_pb2.ATTACHED,
        memory_bytes=foreign.domain.maxMemory() * KIB,
        method=host_pb2.HINTING,
        hinting=host_pb2.HintingSettings(isolator=isolator, policy="eager"),
    )


def _extra(seed: int, *, stress: bool) -> Extra:
    return Extra(
        parameters=f"panic=1 memhp_default_state=online_movable hintfleet.torture={seed}"
        + (f" hintfleet.stress={_STRESS}" if stress else ""),
        packages=["stress-ng"] if stress else [],
        files={
            "/etc/python3.11/sitecustomize.py": (_HERE / "sitecustomize.py").read_text(),
            "/etc/systemd/system/hintfleet-guest.service.d/torture.conf": _AGENT_ALWAYS,
            f"/etc/systemd/system/{_WORKLOAD}": _WORKLOAD_UNIT,
            "/usr/local/lib/hintfleet-ended": _ENDED,
        },
        enabled=[_WORKLOAD],
        has_cell=True,
    )

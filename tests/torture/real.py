"""The setting for torture of real guests: one with each isolator (kmod and hugetlb), whose agents
kill themselves."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.guests.libvirt.api import modules
from host_agent.guests.libvirt.image import GuestImage
from tests.support.relay import Relay
from tests.support.vm import ROOT, console, image_with, spec
from tests.torture import injectors
from tests.torture.guest import Victim
from tests.torture.place import Deadlines
from tests.torture.plan import Kind, Pace
from tests.torture.report import Report
from tests.torture.run import Setting

_MEMORY_BYTES = 768 * MIB
_STRESS = "128M"
_EVIDENCE_CHARACTERS = 3000
_AGENT_ENDED = {
    Kind.AGENT_KILLED: "the agent was killed (status 137)",
    Kind.AGENT_STOPPED: "the agent was stopped",
}
_STRESS_ENDED = "STRESS round ended with status "
# The kernel's line about a program that used an address that it must not use, and died of it
# (arch/x86/mm/fault.c: show_signal_msg). A program that has lost pages often does that.
_CRASHED = ": segfault at "

_KINDS: Mapping[Kind, int] = {
    Kind.LINK_CUT: 6,
    Kind.LINK_STALLED: 4,
    Kind.LINK_DELAYED: 2,
    Kind.SESSION_REPLAYED: 4,
    Kind.SECOND_AGENT: 3,
    Kind.BOOT_ID_CHANGED: 1,
    Kind.GUEST_SUSPENDED: 4,
    Kind.MEMORY_RESIZED: 2,
}
_ENDS: Mapping[Kind, int] = {Kind.GUEST_KILLED: 1, Kind.GUEST_RESET: 1}


@dataclass(kw_only=True)
class RealVictim(Victim):
    """A virtual machine. Its console shows when its agent ends, when stress-ng fails, and when any
    program crashes: pages of programs, too, can be lost.

    :ivar said: how often each text that is counted has been found on the console so far.
    """

    said: Counter[str] = field(default_factory=Counter)

    def read_console(self, report: Report) -> None:
        with contextlib.suppress(OSError, IndexError):  # if the guest is gone
            text = self._console()
            for kind, words in _AGENT_ENDED.items():
                report.faults[kind] += self._news(text, words)
            rounds = self._news(text, _STRESS_ENDED)
            well = self._news(text, f"{_STRESS_ENDED}0")
            report.stress_rounds += rounds
            if rounds != well:
                report.problem(f"guest {self.name}: stress-ng failed:\n{self.evidence()}")
            if crashed := self._news(text, _CRASHED):
                report.problem(f"guest {self.name}: {crashed} crashes:\n{self.evidence()}")

    def evidence(self) -> str:
        with contextlib.suppress(OSError, IndexError):
            return self._console()[-_EVIDENCE_CHARACTERS:]
        return ""

    def _console(self) -> str:
        return console(self.pid)

    def _news(self, text: str, what: str) -> int:
        news = text.count(what) - self.said[what]
        self.said[what] += news
        return news


@contextmanager
def setting(seed: int, *, short: bool = False, stress: bool = False) -> Iterator[Setting]:
    """Yield what to torture: a guest with each isolator, from an image whose agents kill
    themselves. The image is removed at the end of the block.

    :param short: have every kind of fault come within a minute or two; else faults that end a
        guest are rarer, so that guests live longer.
    :param stress: run stress-ng in the guests, too.
    """
    libvirt, _ = modules()
    with contextlib.ExitStack() as undo:
        images = Path(tempfile.mkdtemp(prefix="hf-torture-images-"))
        undo.callback(shutil.rmtree, images)
        images.chmod(0o755)
        # Python runs this file at each start in the guest. If the kernel's command line has
        # hintfleet.torture, the file makes the agents kill themselves.
        dying = {"hintfleet/sitecustomize.py": Path(__file__).parent / "in_guest/sitecustomize.py"}
        image_with(built_image(["stress-ng"] if stress else []), dying, images)
        connection = libvirt.open(os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system"))
        undo.callback(connection.close)
        parameters = f"init_on_alloc=0 hintfleet.torture={seed}"
        parameters += f" hintfleet.stress={_STRESS}" if stress else ""
        yield Setting(
            driver="libvirt",
            guests={f"torture-{name}": _spec(name, parameters) for name in ("kmod", "hugetlb")},
            kinds={**_ENDS, **{kind: n if short else 4 * n for kind, n in _KINDS.items()}},
            host_kinds={Kind.HOST_AGENT_SUSPENDED: 4, Kind.HOST_AGENT_KILLED: 1},
            injectors=injectors.REAL,
            pace=Pace(pause_s=0.5, lag_s=0.02, hold_s=1.0, longest_hold_s=0 if short else 20),
            deadlines=Deadlines(create_s=180, step_s=60, silence_s=120),
            advertise=lambda address: f"10.0.2.2:{address.port}",
            victim_of=_taking_hold(connection),
            longest_wait_s=0.5,
            back_s=5 if short else 30,
            back_means_answered=not short,
            busy_share=0.4,
            environment={"HINTFLEET_IMAGE_DIR": str(images)},
        )


def _spec(isolator: str, parameters: str) -> host_pb2.GuestSpec:
    made = spec(
        isolator=isolator, policy="eager", parameters=parameters, memory_bytes=_MEMORY_BYTES
    )
    made.max_memory_bytes = _MEMORY_BYTES + 128 * MIB
    return made


def _taking_hold(connection: Any) -> Callable[[host_pb2.Guest, Relay], Victim]:
    def take_hold(guest: host_pb2.Guest, relay: Relay) -> Victim:
        return RealVictim.of(guest, relay, partial(connection.lookupByUUIDString, guest.uuid))

    return take_hold


def built_image(packages: Sequence[str] = ()) -> GuestImage:
    """Return this tree's guest image with these packages; build it if it is not cached."""
    command = [sys.executable, str(ROOT / "deploy/image/build.py"), "--print-path"]
    for package in packages:
        command += ["--package", package]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return GuestImage(directory=Path(done.stdout.strip()), kernel_release="")

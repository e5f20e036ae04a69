"""Runs in a real guest as Python starts there, told by the kernel's command line.

hintfleet.torture=SEED has the agent kill itself (-9), or ask itself to end, at steps of the
protocol, again and again: init starts the next. hintfleet.stress=SIZE has
`stress-ng --vm --verify` run beside the workload, round after round; each round's end is said
on the console.
"""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTS = Path("/run/hintfleet-torture-starts")
STRESS = """
while :; do
    nice -n 10 stress-ng --quiet --temp-path /tmp --timeout 20s --vm 1 --vm-bytes {size} --verify
    echo "STRESS round ended with status $?"
done
"""


def parameter(name: str) -> str:
    found = re.search(rf"hintfleet\.{name}=(\S+)", Path("/proc/cmdline").read_text())
    return found[1] if found else ""


class Death:
    """When this agent is to die, and how: so many steps after so long, at once or a little
    later, by kill -9 or, one time in four, by SIGTERM."""

    def __init__(self, seed: str) -> None:
        starts = int(STARTS.read_text()) if STARTS.exists() else 0
        STARTS.write_text(str(starts + 1))
        chance = random.Random(f"{seed} {starts}")
        self.after_s = time.monotonic() + chance.choice((0, 3, 10, 20))
        self.steps = chance.randrange(1, 30)
        self.lag_s = chance.choice((0.0, chance.uniform(0, 0.02)))
        self.signal = chance.choice((signal.SIGTERM, *[signal.SIGKILL] * 3))

    def step(self) -> None:
        if time.monotonic() < self.after_s:
            return
        self.steps -= 1
        if self.steps == 0:
            if self.lag_s:
                asyncio.get_running_loop().call_later(self.lag_s, self.strike)
            else:
                self.strike()

    def strike(self) -> None:
        os.kill(os.getpid(), self.signal)


def with_steps(method: Callable[..., Any], death: Death) -> Callable[..., Any]:
    """A step before the method and one after it."""

    def stepping(*arguments: Any) -> Any:
        death.step()
        result = method(*arguments)
        death.step()
        return result

    return stepping


def arm(seed: str) -> None:
    """Each instruction that the agent carries out is a step, and each message that it hears."""
    from guest_agent.session import HintingSession

    death = Death(seed)
    for name in ("_carry_out_one", "_handle_message"):
        setattr(HintingSession, name, with_steps(getattr(HintingSession, name), death))


if "--workload-only" not in sys.orig_argv:
    if seed := parameter("torture"):
        arm(seed)
elif size := parameter("stress"):
    subprocess.Popen(["/bin/sh", "-c", STRESS.format(size=size)])

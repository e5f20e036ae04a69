"""Runs in a real guest whenever Python starts there. What it does depends on the kernel's command
line; programs other than the agent and its workload are left alone.

With hintfleet.torture=SEED, each agent ends itself, by SIGKILL or SIGTERM, at a step of the
protocol; init or systemd starts the next one. With hintfleet.stress=SIZE, `stress-ng --vm --verify`
runs beside the workload, in rounds; the end of each round is printed on the console.
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
    """When and how this agent dies: `steps` steps after the time `after_s`, at once or `lag_s`
    later, by SIGKILL or, one time in four, by SIGTERM."""

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
                asyncio.get_running_loop().call_later(self.lag_s, self.end_agent)
            else:
                self.end_agent()

    def end_agent(self) -> None:
        os.kill(os.getpid(), self.signal)


def with_steps(method: Callable[..., Any], death: Death) -> Callable[..., Any]:
    """Return a method that does what `method` does, and counts a step before and one after it."""

    def stepping(*arguments: Any) -> Any:
        death.step()
        result = method(*arguments)
        death.step()
        return result

    return stepping


def install(seed: str) -> None:
    """Have this agent end itself as `Death` decides. Its steps are the beginning and the end of
    each instruction that it carries out, and of each message that it handles."""
    from guest_agent.session import HintingSession

    death = Death(seed)
    for name in ("_carry_out_one", "_handle_message"):
        setattr(HintingSession, name, with_steps(getattr(HintingSession, name), death))


def is_agent() -> bool:
    """Return whether this is the agent or its workload, and no other program in Python."""
    return "guest_agent" in sys.orig_argv or any("hintfleet-guest" in a for a in sys.orig_argv)


if not is_agent():
    pass
elif "--workload-only" not in sys.orig_argv:
    if seed := parameter("torture"):
        install(seed)
elif size := parameter("stress"):
    subprocess.Popen(["/bin/sh", "-c", STRESS.format(size=size)])

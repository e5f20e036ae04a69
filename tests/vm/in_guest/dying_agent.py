"""Runs in a guest whenever Python starts there. The kernel's command line selects what it does.

hintfleet.test=die: the first agent kills itself (SIGKILL) when it has isolated chunks. Then
nr_hugepages is set to 0. The second agent prints on the console what it found in the hugetlb pool,
and why another agent could not use the pool. When it has isolated chunks, it stops itself
(SIGTERM); at its end it prints what it left in the pool.
hintfleet.test=no-eject: the kernel refuses to eject DIMMs.
"""

import os
import signal
import sys
from pathlib import Path

DIED = Path("/run/hintfleet-test-died")
STOPPED = Path("/run/hintfleet-test-stopped")


def install() -> None:
    from guest_agent.isolation.hugetlb import HugetlbIsolator
    from guest_agent.isolation.hugetlb_pool import HugetlbPool
    from hintfleet.errors import Refused
    from hintfleet.ranges import RangeSet

    take, close = HugetlbIsolator.isolate, HugetlbIsolator.close
    open_pool = HugetlbPool.open

    def isolate_and_die(self: HugetlbIsolator, max_ranges: int, max_pages: int) -> RangeSet:
        taken = take(self, max_ranges, max_pages)
        if taken and not DIED.exists():
            DIED.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif taken and not STOPPED.exists():
            STOPPED.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    def close_and_tell(self: HugetlbIsolator) -> None:
        close(self)
        print(f"PROBE left {HugetlbPool().state()}", flush=True)

    def open_and_tell(self: HugetlbPool) -> RangeSet:
        after_death = DIED.exists() and not STOPPED.exists()
        if after_death:
            # An operator wants the memory back.
            (self._pool / "nr_hugepages").write_text("0")
        found = self.state()
        left = open_pool(self)
        if after_death:
            print(f"PROBE found {found}, adopted {left.page_count // 512}", flush=True)
            print(f"PROBE second agent: {refusal_of_a_second()}", flush=True)
        return left

    def refusal_of_a_second() -> str:
        try:
            open_pool(HugetlbPool())
        except Refused as error:
            return error.message
        return ""

    HugetlbIsolator.isolate = isolate_and_die  # type: ignore[method-assign]
    HugetlbIsolator.close = close_and_tell  # type: ignore[method-assign]
    HugetlbPool.open = open_and_tell  # type: ignore[method-assign]


agent = "--workload-only" not in sys.orig_argv
parameters = Path("/proc/cmdline").read_text().split()
if agent and "hintfleet.test=die" in parameters:
    install()
if "hintfleet.test=no-eject" in parameters:
    Path("/sys/firmware/acpi/hotplug/memory/enabled").write_text("0")

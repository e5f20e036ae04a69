"""Runs in a guest as Python starts there: has its agent die while a batch is out.

Only with hintfleet.test=die on the kernel's command line, and only the first time;
the next agent says on the console what it found.
"""

import os
import signal
from pathlib import Path

DIED = Path("/run/hintfleet-test-died")


def arm() -> None:
    from guest_agent.isolation.hugetlb import HugetlbIsolator
    from guest_agent.isolation.hugetlb_pool import HugetlbPool
    from hintfleet.ranges import RangeSet

    take, open_pool = HugetlbIsolator.isolate, HugetlbPool.open

    def isolate_and_die(self: HugetlbIsolator, max_ranges: int, max_pages: int) -> RangeSet:
        taken = take(self, max_ranges, max_pages)
        if taken and not DIED.exists():
            DIED.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return taken

    def open_and_tell(self: HugetlbPool) -> RangeSet:
        found = self.state()
        left = open_pool(self)
        if DIED.exists():
            print(f"PROBE found {found}, adopted {left.page_count // 512}", flush=True)
        return left

    HugetlbIsolator.isolate = isolate_and_die
    HugetlbPool.open = open_and_tell


if "hintfleet.test=die" in Path("/proc/cmdline").read_text():
    arm()

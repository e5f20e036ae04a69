"""Runs in a guest instead of its agent: Python imports this module at its start, and the module
ends the process.

It uses /dev/hintfleet like agents that run and die, and prints what it saw as one line of JSON on
the console.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import struct
import sys
import time
import traceback
from collections.abc import Callable

from guest_agent.isolation import kmod
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet

MIB = 1 << 20
MODULE = b"hintfleet_kmod"


def dirty_and_free(size_bytes: int) -> None:
    memory = mmap.mmap(-1, size_bytes)
    for offset in range(0, size_bytes, 4096):
        memory[offset] = 1
    memory.close()


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except Refused as error:
        return str(error)
    return ""


def errno_of(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def remove_module() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(176, MODULE, os.O_NONBLOCK):  # 176: delete_module(2)
        raise OSError(ctypes.get_errno(), "delete_module")


def next_batch(isolator: kmod.KmodIsolator) -> RangeSet:
    while True:
        ranges = isolator.isolate(32, 1 << 20)
        if ranges or isolator.idle():
            return ranges
        time.sleep(0.001)


def drain(isolator: kmod.KmodIsolator) -> int:
    isolator.report_now(thorough=True)
    pages = 0
    while ranges := next_batch(isolator):
        pages += ranges.page_count
        isolator.release(ranges, hinted=True)
    return pages


def pairs(ranges: RangeSet) -> list[tuple[int, int]]:
    return [(r.pfn, r.page_count) for r in ranges]


def an_agent_that_dies() -> dict[str, object]:
    first = kmod.KmodIsolator()
    seen: dict[str, object] = {"left_at_first": pairs(first.start(lambda: None))}
    seen["second_open"] = refusal(lambda: kmod.KmodIsolator().start(lambda: None))
    dirty_and_free(300 * MIB)
    first.report_now(thorough=True)
    held = next_batch(first)
    seen |= {"held": pairs(held), "while_held": pairs(first.isolate(32, 1 << 20))}
    wrong = struct.pack("=Q", 1 << 40)
    seen["wrong_ack"] = errno_of(lambda: fcntl.ioctl(first._fd, kmod._IOC_ACK, wrong))
    first.close()
    seen["rmmod_while_held"] = errno_of(remove_module)

    second = kmod.KmodIsolator()
    left = second.start(lambda: None)
    seen["left_at_second"] = pairs(left)
    second.release(left, hinted=False)
    seen["wanted_after_return"] = not second.idle()
    seen["drained_pages"] = drain(second)
    seen["again_pages"] = drain(second)
    second.close()
    return seen


def an_agent_that_does_not_read() -> dict[str, object]:
    wakes: list[float] = []
    isolator = kmod.KmodIsolator()
    isolator.start(lambda: wakes.append(time.monotonic()))
    dirty_and_free(128 * MIB)
    isolator.report_now(thorough=True)
    time.sleep(1.5)
    seen: dict[str, object] = {
        "woken": bool(wakes),
        "taken_back": errno_of(lambda: os.read(isolator._fd, 1 << 12)),
        "still_wanted": not isolator.idle(),
        "pages_later": drain(isolator),
    }
    isolator.close()
    return seen


def longest_list_of_a_cpu() -> int:
    """Return the highest limit, over all CPUs and zones, of the freed pages that a CPU keeps on its
    own lists."""
    with open("/proc/zoneinfo") as file:
        return max(int(high) for high in re.findall(r"count: +\d+\s+high: +(\d+)", file.read()))


def main() -> None:
    seen = an_agent_that_dies() | an_agent_that_does_not_read()
    seen["longest_list_of_a_cpu"] = longest_list_of_a_cpu()
    seen["rmmod"] = errno_of(remove_module)
    seen["no_module"] = refusal(lambda: kmod.KmodIsolator().start(lambda: None))
    print("PROBE " + json.dumps(seen), flush=True)


if "--workload-only" not in sys.orig_argv:
    try:
        main()
    except BaseException:  # noqa: BLE001 - all of it is evidence
        traceback.print_exc()
os._exit(1)  # so that no agent or workload starts; then init ends the guest

"""Runs in a guest beside its agent. Measures the agent, two bare clients that this program starts,
and how fast this program reads page flags and free lists.

    python3 probe.py HOST:PORT     the host to which the bare clients hold streams

After each window of _WINDOW_S seconds, prints a line on the console: PROBE and a JSON object. The
benchmark uses the last line: by then, the guest has been at rest for longer than a window.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from guest_agent.memory.kernel import KPF_HUGE, FreeLists, PageFlags, present_spans

_WINDOW_S = 10.0
_ROUNDS = 21
_ORDER = 9
_TRACING = Path("/sys/kernel/tracing")
_SYS_ENTER = _TRACING / "events/raw_syscalls/sys_enter"
_CLIENT = Path(__file__).with_name("bare_client.py")


def main() -> None:
    """Measure for as long as the guest runs."""
    ctypes.CDLL(None).mount(b"none", bytes(_TRACING), b"tracefs", ctypes.c_ulong(0), None)
    pids = {"agent": os.getppid()}
    for kind in ("aio", "sync"):
        pids[kind] = subprocess.Popen([sys.executable, _CLIENT, kind, sys.argv[1]]).pid
    while True:
        seen = over_a_window(pids)
        seen["memory_kib"] = {name: memory_kib(pid) for name, pid in pids.items()}
        seen |= {"scan_ns": scan_ns(), "look_ns": look_ns()}
        print("PROBE " + json.dumps(seen), flush=True)


def over_a_window(pids: Mapping[str, int]) -> dict[str, object]:
    """Return what was used in the next _WINDOW_S: the CPU of each process in % of a core, and the
    system calls per second of the agent's main thread, by number."""
    trigger = f"hist:keys=id if common_pid == {pids['agent']}"
    (_SYS_ENTER / "trigger").write_text(trigger)
    before_ns = {name: cpu_ns(pid) for name, pid in pids.items()}
    time.sleep(_WINDOW_S)
    used_ns = {name: cpu_ns(pid) - before_ns[name] for name, pid in pids.items()}
    calls = re.findall(r"{ id: +(\d+).*?} hitcount: +(\d+)", (_SYS_ENTER / "hist").read_text())
    (_SYS_ENTER / "trigger").write_text(f"!{trigger}")
    return {
        "cpu_percent": {name: ns / _WINDOW_S / 1e7 for name, ns in used_ns.items()},
        "calls_per_s": {number: int(count) / _WINDOW_S for number, count in calls},
    }


def cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads that have not ended, from the scheduler's counters."""
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir()
    )


def memory_kib(pid: int) -> dict[str, int]:
    """Return VmRSS of /proc/PID/status, and Rss and Pss of /proc/PID/smaps_rollup, in KiB."""
    said = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
    return {k: int(kib) for k, kib in re.findall(r"^(VmRSS|Rss|Pss):\s+(\d+) kB", said, re.M)}


def scan_ns() -> list[tuple[int, int]]:
    """Return two CPU times for each round: of reading one entry of the page flags for each chunk
    with `PageFlags`, and of the same reads in Python's fastest loop."""
    spans = present_spans()
    step = 8 << _ORDER
    offsets = [at for s in spans for at in range(s.start * 8, s.stop * 8, step)]
    flags = PageFlags()
    fd = os.open("/proc/kpageflags", os.O_RDONLY)

    def bare_loop() -> None:
        pread = os.pread
        for offset in offsets:
            pread(fd, 8, offset)

    rounds = [
        (
            elapsed_ns(lambda: flags.chunks_with(KPF_HUGE, spans, _ORDER)),
            elapsed_ns(bare_loop),
        )
        for _ in range(_ROUNDS)
    ]
    flags.close()
    os.close(fd)
    return rounds


def look_ns() -> list[tuple[int, int]]:
    """Return two CPU times for each round: of reading the free lists with `FreeLists`, and of a
    bare read of the same file."""
    lists = FreeLists(_ORDER)
    fd = os.open("/proc/buddyinfo", os.O_RDONLY)
    rounds = [
        (
            elapsed_ns(lists.free_chunk_count),
            elapsed_ns(lambda: os.pread(fd, 4096, 0)),
        )
        for _ in range(_ROUNDS)
    ]
    lists.close()
    os.close(fd)
    return rounds


def elapsed_ns(act: Callable[[], object]) -> int:
    """Return the CPU time that this process uses during a call."""
    began_ns = time.process_time_ns()
    act()
    return time.process_time_ns() - began_ns


main()

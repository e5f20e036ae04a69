"""Runs in a guest when Python starts there for the first time: puts its process into cgroups (v2)
with limits, and prints on the console which limits hintfleet finds.

It runs in a guest because the host may have only cgroups v1; the guest's kernel always has v2.
"""

import ctypes
import os
from pathlib import Path

from hintfleet.system.machine_limits import available_memory, processors, total_memory

ROOT = Path("/sys/fs/cgroup")
OUTER = ROOT / "outer"
INNER = OUTER / "inner"

if not INNER.exists():
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"cgroup2", bytes(ROOT), b"cgroup2", 0, None) == 0, ctypes.get_errno()
    (ROOT / "cgroup.subtree_control").write_text("+memory +cpu")
    OUTER.mkdir()
    (OUTER / "cgroup.subtree_control").write_text("+memory")
    INNER.mkdir()
    (OUTER / "memory.max").write_text(str(200 << 20))
    (OUTER / "cpu.max").write_text("50000 100000")
    (INNER / "cgroup.procs").write_text(str(os.getpid()))
    for high in (str(150 << 20), "max"):
        (INNER / "memory.high").write_text(high)
        total, left, cpus = total_memory(), available_memory(), processors()
        print(f"PROBE total {total.value >> 20} MiB {total.where}", flush=True)
        print(f"PROBE less {0 < total.value - left.value < 100 << 20} {left.where}", flush=True)
        print(f"PROBE processors {cpus.value} {cpus.where}", flush=True)
    print("PROBE done", flush=True)

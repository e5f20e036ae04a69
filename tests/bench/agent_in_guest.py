"""Measure what the agent costs in an idle real guest, with kmod and with hugetlb: its memory and
CPU time beside bare gRPC clients, and the reads and ioctls of its main thread.
With hugetlb, also measure how fast page flags and free lists are read, beside bare reads."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hintfleet.errors import Refused
from hintfleet.units import MIB
from host_agent.guests.libvirt.api import modules
from host_agent.guests.libvirt.image import find_image
from tests.bench.report import Figure, side_by_side
from tests.bench.silent_host import silent_host
from tests.support.agents import running_host_agent
from tests.support.vm import Guests, console, image_with, spec

_ISOLATORS = ("kmod", "hugetlb")
_WORK_ROUNDS = 3
_WORK_BYTES = 400 * MIB
_REST_S = 25.0  # long enough to contain a whole window of the probe (10 s)
_IN_GUEST = Path(__file__).with_name("in_guest")
_FILES = {
    "hintfleet/sitecustomize.py": _IN_GUEST / "start_probe.py",
    "hintfleet/probe.py": _IN_GUEST / "probe.py",
    "hintfleet/bare_client.py": _IN_GUEST / "bare_client.py",
}
# Numbers of system calls on x86-64: read and pread64; ioctl.
_READS = ("0", "17")
_IOCTL = ("16",)


def run() -> Iterator[Figure]:
    """Measure one guest after the other: each works, then rests, and is measured at rest. Yield
    nothing if libvirt-python or the guest image is missing."""
    try:
        modules()
        image = find_image()
    except Refused as error:
        print(f"skipped: {error}", file=sys.stderr)
        return
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="hf-bench-")))
        folder.chmod(0o755)  # QEMU's user must be able to read the image in this folder
        os.environ["HINTFLEET_IMAGE_DIR"] = str(image_with(image, _FILES, folder))
        undo.callback(os.environ.__setitem__, "HINTFLEET_IMAGE_DIR", str(image.directory.parent))
        port = undo.enter_context(silent_host())
        for isolator in _ISOLATORS:
            yield from _figures(isolator, _seen_at_rest(isolator, port))


def _seen_at_rest(isolator: str, port: int) -> dict[str, Any]:
    """Run a guest that works, then rests; return the last line that its probe printed, parsed.

    :raises RuntimeError: the probe printed no line.
    """
    wanted = spec(isolator=isolator, parameters=f"init_on_alloc=0 hintfleet.bench={port}")
    with running_host_agent() as host:
        host.watch(timeout_s=600)
        guest = Guests(host, {isolator: wanted})[isolator]
        for _ in range(_WORK_ROUNDS):
            host.allocate(_WORK_BYTES, isolator)
            host.free(_WORK_BYTES, isolator)
        host.settle(isolator)
        time.sleep(_REST_S)
        said = console(guest.pid)
    lines = [line.partition("PROBE ")[2] for line in said.splitlines() if "PROBE {" in line]
    if not lines:
        raise RuntimeError(f"the probe printed nothing:\n{said}")
    seen: dict[str, Any] = json.loads(lines[-1])
    return seen


def _figures(isolator: str, seen: dict[str, Any]) -> Iterator[Figure]:
    """Yield the figures of one guest. Rss is from smaps_rollup, which counts pages. Before Linux
    6.2, VmRSS misses up to 64 page faults of each thread (mm/memory.c: SPLIT_RSS_COUNTING)."""
    memory, cpu = seen["memory_kib"], seen["cpu_percent"]
    for client in ("aio", "sync"):
        for measure, wanted in (("Rss", "<= 1.15"), ("VmRSS", ""), ("Pss", "")):
            pair = (memory["agent"][measure] / 1024, memory[client][measure] / 1024)
            name = f"{measure}, agent with {isolator} / bare {client} client"
            yield side_by_side(name, "MiB", [pair], wanted)
        name = f"idle, agent with {isolator} / bare {client} client"
        yield side_by_side(name, "% of a core", [(cpu["agent"], cpu[client])])
    for what, numbers in (("reads", _READS), ("ioctls", _IOCTL)):
        per_s = sum(seen["calls_per_s"].get(number, 0.0) for number in numbers)
        yield Figure(name=f"{what} at rest, {isolator}", unit="1/s", ours=per_s)
    if isolator == "hugetlb":
        for name, key in (
            ("page flags of all chunks / a loop of bare reads, in a guest", "scan_ns"),
            ("reading the free lists / a bare read of the file, in a guest", "look_ns"),
        ):
            # The pairs are speeds, not times: a ratio below 1 means slower than bare reads.
            pairs = [(1e9 / ours, 1e9 / bare) for ours, bare in seen[key]]
            yield side_by_side(name, "1/s", pairs)

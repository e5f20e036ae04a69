"""Facts about the machine that the orchestrator runs on, and where its private folders are."""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from hintfleet import __version__
from hintfleet.system.machine_limits import processors, total_memory
from hintfleet.system.owned_folders import OwnedFolders
from hintfleet.units import format_size

# The path of a unix socket has at most 107 bytes (unix(7)). The longest one in a private folder is
# Ray's `plasma_store`: it adds 76 to 88 bytes to the base folder, by the length of the process id.
_MAX_BASE_LENGTH = 19


def runtime_dirs() -> OwnedFolders:
    """Return what makes and finds the private folders of runs, in a folder whose path is so short
    that unix sockets fit."""
    base = Path(tempfile.gettempdir())
    short = base if len(str(base)) <= _MAX_BASE_LENGTH else Path("/tmp")  # noqa: S108
    return OwnedFolders(base=short, prefix="hf-")


def environment() -> dict[str, str]:
    """Return facts about this machine, as text: its processors and memory, and the versions of
    hintfleet, Python, the kernel, Ray, gRPC and protobuf. The store adds the hypervisors of a run's
    guests, if they have any."""
    return {
        "hintfleet": __version__,
        "Python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": f"{processors().value:g} x {_processor()}",
        "memory": format_size(total_memory().value),
        **{name: version(name) for name in ("ray", "grpcio", "protobuf")},
    }


def _processor() -> str:
    # On Linux, platform.processor() returns at most the architecture (it runs `uname -p`).
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"

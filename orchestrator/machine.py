"""What the machine under the orchestrator has."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from hintfleet import __version__
from hintfleet.errors import Refused
from hintfleet.owned_folders import OwnedFolders
from hintfleet.units import format_size

# sockaddr_un has room for 107 characters; what is made below needs about 75.
_MAX_BASE_LENGTH = 30


def meminfo_bytes(field: str) -> int:
    """A field of /proc/meminfo, such as `MemAvailable`.

    :raises Refused: this kernel does not say.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise Refused(f"/proc/meminfo has no {field}")


def runtime_dirs() -> OwnedFolders:
    """The orchestrators' private folders, whose paths are short enough for unix sockets."""
    base = Path(tempfile.gettempdir())
    short = base if len(str(base)) <= _MAX_BASE_LENGTH else Path("/tmp")  # noqa: S108
    return OwnedFolders(base=short, prefix="hf-")


def environment() -> dict[str, str]:
    """What a run's figures depend on, for people who read them later."""
    return {
        "hintfleet": __version__,
        "Python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": f"{len(os.sched_getaffinity(0))} x {_processor()}",
        "memory": format_size(meminfo_bytes("MemTotal")),
        **{name: version(name) for name in ("ray", "grpcio", "protobuf")},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"

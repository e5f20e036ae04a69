"""What the machine under the orchestrator has."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hintfleet.errors import Refused

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


def make_runtime_dir() -> Path:
    """A new private folder whose path is short enough for unix sockets in it."""
    base = tempfile.gettempdir()
    if len(base) > _MAX_BASE_LENGTH:
        base = "/tmp"  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="hf-", dir=base))

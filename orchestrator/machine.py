"""What the machine under the orchestrator has."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from hintfleet import __version__
from hintfleet.errors import Refused
from hintfleet.units import format_size

# sockaddr_un has room for 107 characters; what is made below needs about 75.
_MAX_BASE_LENGTH = 30
_PREFIX = "hf-"


def meminfo_bytes(field: str) -> int:
    """A field of /proc/meminfo, such as `MemAvailable`.

    :raises Refused: this kernel does not say.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise Refused(f"/proc/meminfo has no {field}")


class RuntimeDir:
    """A new private folder whose path is short enough for unix sockets in it.

    Those of processes that were killed are removed on this occasion: each holds a
    lock on its folder while it lives, which tells also where process ids do not
    (after one was used again, or in another container).

    :ivar path: where it is.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        if len(str(base)) > _MAX_BASE_LENGTH:
            base = Path("/tmp")  # noqa: S108
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
        self._fd = _lock(self.path)

    def remove(self) -> None:
        """Remove it with all that is in it. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock on a folder.

    :raises OSError: another process holds it, or there is no such folder of ours.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _sweep(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        # One that lives and has not taken its lock yet is left alone.
        if not pid.isdecimal() or Path(f"/proc/{pid}").exists():
            continue
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                fd = _lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)


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

"""The files of one libvirt guest: its console and its agent's configuration."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "hintfleet-guest-"


@dataclass(frozen=True)
class RuntimeDir:
    """A directory for one guest's files, through which QEMU's user can get at them."""

    path: Path

    @classmethod
    def make(cls) -> RuntimeDir:
        """A new one. Those of host agents that were killed are removed on this occasion."""
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        path.chmod(0o711)
        return cls(path)

    @property
    def console(self) -> Path:
        """Written by libvirt's log daemon, or QEMU."""
        return self.path / "console.log"

    @property
    def config(self) -> Path:
        """Holds the guest's token; libvirt makes it readable to QEMU."""
        return self.path / "config.json"

    def write_config(self, text: str) -> None:
        """Write the agent's configuration, for nobody else to read."""
        self.config.touch(mode=0o600)
        self.config.write_text(text)

    def console_tail(self, line_count: int) -> str:
        """The last lines of the console, or why there are none."""
        try:
            lines = self.console.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(no console: {error.strerror})"
        return "\n".join(lines[-line_count:])

    def remove(self) -> None:
        """Remove it with all that is in it; it may be gone already."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            mine = path.lstat().st_uid == os.geteuid()
            if mine and pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)

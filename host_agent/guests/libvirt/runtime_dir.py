"""The files of one libvirt guest: its console and its agent's configuration."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hintfleet.system.owned_folders import OwnedFolder, OwnedFolders
from host_agent.guests.libvirt.qemu_user import QemuUser

_TAIL_BYTES = 4096
_SHARED = Path("/tmp")  # noqa: S108


def runtime_dirs() -> list[OwnedFolders]:
    """Those of all host agents of this machine: in the temporary folder, or in everybody's, for
    one's own may keep QEMU's user out (libpam-tmpdir)."""
    bases = dict.fromkeys((Path(tempfile.gettempdir()), _SHARED))
    return [OwnedFolders(base=base, prefix="hintfleet-guest-") for base in bases]


@dataclass(frozen=True)
class RuntimeDir:
    """A directory for one guest's files, through which QEMU's user can get at them.

    :ivar owned: the same, where it does not outlive its host agent.
    """

    path: Path
    owned: OwnedFolder | None = None

    @classmethod
    def make(cls, user: QemuUser | None = None) -> RuntimeDir:
        """A new one. Those of host agents that were killed are removed on this occasion.

        :param user: who must be able to get at files in it, if not this user.
        """
        places = runtime_dirs()
        open_to_all = (p for p in places if user is None or user.barrier(p.base) is None)
        owned = next(open_to_all, places[0]).make()
        owned.path.chmod(0o711)
        return cls(owned.path, owned)

    @classmethod
    def at(cls, path: Path) -> RuntimeDir:
        """One that outlives the host agent, made if need be."""
        path.mkdir(exist_ok=True)
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
            with self.console.open("rb") as console:
                console.seek(max(0, self.console.stat().st_size - _TAIL_BYTES))
                lines = console.read(_TAIL_BYTES).decode(errors="replace").splitlines()
        except OSError as error:
            return f"(no console: {error.strerror})"
        return "\n".join(lines[-line_count:])

    def remove(self) -> None:
        """Remove it with all that is in it; it may be gone already. May be called twice."""
        if self.owned is not None:
            self.owned.remove()
        shutil.rmtree(self.path, ignore_errors=True)

"""The folder with one libvirt guest's files: console, agent's configuration, socket of the memory
door. Under Survival the socket is elsewhere (`Survival.door`). An attached guest has a folder only
for its socket, so none under Survival."""

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
    """Return where guests' folders are made without Survival, in order of preference: $TMPDIR,
    then /tmp."""
    # /tmp too, because a private TMPDIR (libpam-tmpdir) may deny access to QEMU's user.
    bases = dict.fromkeys((Path(tempfile.gettempdir()), _SHARED))
    return [OwnedFolders(base=base, prefix="hintfleet-guest-") for base in bases]


@dataclass(frozen=True)
class RuntimeDir:
    """A directory for one guest's files. Its mode lets other users enter it, but not list it.

    :ivar owned: the same directory, locked by this process; None if it outlives the host agent.
    """

    path: Path
    owned: OwnedFolder | None = None

    @classmethod
    def make(cls, user: QemuUser | None = None) -> RuntimeDir:
        """Make a new directory in the first base of `runtime_dirs` that the user can enter, or in
        the first base if the user can enter none. Before, remove the directories that killed host
        agents left in that base.

        :param user: who must be able to enter it; None: do not check.
        """
        places = runtime_dirs()
        accessible = (p for p in places if user is None or user.first_denied(p.base) is None)
        owned = next(accessible, places[0]).make()
        # QEMU's user must be able to enter the directory to reach the files, but not to list it.
        owned.path.chmod(0o711)
        return cls(owned.path, owned)

    @classmethod
    def at(cls, path: Path) -> RuntimeDir:
        """Use a directory that outlives the host agent; make it if it is missing."""
        path.mkdir(exist_ok=True)
        path.chmod(0o711)
        return cls(path)

    @property
    def console(self) -> Path:
        """The console's file, written by libvirt's log daemon or by QEMU."""
        return self.path / "console.log"

    @property
    def config(self) -> Path:
        """The agent's configuration, with the guest's token."""
        # libvirt makes the file readable for QEMU's user when it starts the domain.
        return self.path / "config.json"

    @property
    def door(self) -> Path:
        """The socket of the guest's memory door."""
        return self.path / "door.sock"

    def write_config(self, text: str) -> None:
        """Write the guest agent's configuration. Before the domain starts, only this user can read
        it."""
        self.config.touch(mode=0o600)
        self.config.write_text(text)

    def console_tail(self, line_count: int) -> str:
        """Return the last `line_count` lines of the console, at most 4 KiB, or why it cannot be
        read."""
        try:
            with self.console.open("rb") as console:
                console.seek(max(0, self.console.stat().st_size - _TAIL_BYTES))
                lines = console.read(_TAIL_BYTES).decode(errors="replace").splitlines()
        except OSError as error:
            return f"(no console: {error.strerror})"
        return "\n".join(lines[-line_count:])

    def remove(self) -> None:
        """Remove the directory with all that is in it. May be called twice."""
        if self.owned is not None:
            self.owned.remove()
        shutil.rmtree(self.path, ignore_errors=True)

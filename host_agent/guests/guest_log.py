"""The log of an embedded guest's process. Its last lines are shown when the guest fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_TAIL_BYTES = 4096


class GuestLog:
    """A log file. It has a name only if it must outlive the host agent.

    :ivar file: the process writes to it.
    """

    def __init__(self, folder: Path | None) -> None:
        """:param folder: folder of the file `log`; both are made if missing. None: use a file
        without a name."""
        if folder is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        else:
            folder.mkdir(mode=0o700, exist_ok=True)
            self.file = (folder / "log").open("a+b")

    def tail(self) -> str:
        """Return the last 4 KiB of the log, or a note that it is empty; "" after `close`."""
        if self.file.closed:
            return ""
        # pread, because the process shares this file's position: a seek could move where it writes.
        size = os.fstat(self.file.fileno()).st_size
        start = max(0, size - _TAIL_BYTES)
        text = os.pread(self.file.fileno(), _TAIL_BYTES, start).decode(errors="replace")
        return text.strip() or "(it wrote nothing)"

    def close(self) -> None:
        """Close the file; may be called twice."""
        self.file.close()

"""What a guest process writes: the evidence when it fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_TAIL_BYTES = 4096


class GuestLog:
    """A log file, without a name unless it has to outlive the host agent.

    :ivar file: for the process to write to.
    """

    def __init__(self, folder: Path | None) -> None:
        """:param folder: where to keep it, made if need be; None for no name."""
        if folder is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        else:
            folder.mkdir(mode=0o700, exist_ok=True)
            self.file = (folder / "log").open("a+b")

    def tail(self) -> str:
        """Its end."""
        if self.file.closed:
            return ""
        size = os.fstat(self.file.fileno()).st_size
        start = max(0, size - _TAIL_BYTES)
        text = os.pread(self.file.fileno(), _TAIL_BYTES, start).decode(errors="replace")
        return text.strip() or "(it wrote nothing)"

    def close(self) -> None:
        """Close it; may be called twice."""
        self.file.close()

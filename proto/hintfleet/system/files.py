"""Reading files that others name."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def read_at_most(path: str | Path, most_bytes: int) -> bytes:
    """Read a small file whole: a device never ends, and a pipe may have no writer.

    :raises OSError: it cannot be read, is a directory, or is larger than `most_bytes` (EFBIG).
    """
    # O_NONBLOCK: a pipe that nobody writes to is empty; else open would wait, see fifo(7).
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", os.fspath(path))
    return content

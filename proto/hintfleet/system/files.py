"""Reads files whose paths users give."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def read_at_most(path: str | Path, most_bytes: int) -> bytes:
    """Read a whole small file.

    :raises OSError: it cannot be read, is a directory, or is larger than `most_bytes` (EFBIG).
    """
    with open(path, "rb", opener=_open_at_once) as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(most_bytes + 1)  # not read(): a device such as /dev/zero never ends
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", os.fspath(path))
    return content


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe that has no writer blocks until a writer opens it
    # (fifo(7)). With O_NONBLOCK, it opens at once, and a read returns end of file.
    return os.open(path, flags | os.O_NONBLOCK)

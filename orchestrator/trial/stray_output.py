"""What libraries write on a terminal that is not theirs goes into a file.

Ray's C++ writes its log to descriptor 2, from threads of its own, whatever sys.stderr is; its
Python says on stdout and stderr what befell its workers. So the descriptors are exchanged.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hintfleet.errors import Refused

_STDOUT, _STDERR = 1, 2


@contextlib.contextmanager
def stray_output_to(log: Path) -> Iterator[TextIO]:
    """Append all that goes to stdout and stderr, of children too, to a file until the block ends.

    Yields what stderr was before, for what is meant to be seen. Afterwards the file is there
    only if something was ever written to it.

    :raises Refused: it cannot be made.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError as error:
        raise Refused(f"cannot write {log}: {error.strerror}") from error
    with (
        file,
        open(_duplicate(_STDERR), "w", buffering=1, errors="backslashreplace") as terminal,
    ):
        try:
            with _exchanged(_STDOUT, file.fileno()), _exchanged(_STDERR, file.fileno()):
                yield terminal
        finally:
            if not os.fstat(file.fileno()).st_size:
                log.unlink(missing_ok=True)


@contextlib.contextmanager
def _exchanged(fd: int, by: int) -> Iterator[None]:
    _flush()
    before = _duplicate(fd)
    os.dup2(by, fd)
    try:
        yield
    finally:
        _flush_or_discard(by)
        os.dup2(before, fd)
        os.close(before)


def _flush_or_discard(log_fd: int) -> None:
    """Flush into the log; what a full disk does not take must neither hide the error that is on
    its way, nor come out on what is stdout and stderr afterwards."""
    try:
        _flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (_STDOUT, _STDERR):
            if os.path.sameopenfile(fd, log_fd):
                os.dup2(null, fd)
        os.close(null)
        _flush()


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:  # closed by whoever started us
        return os.open(os.devnull, os.O_WRONLY)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()

"""Redirects stdout and stderr of this process and its children into a file, because Ray writes to
them. Output for people is written to another stream, which the caller gets."""

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
    """Append stdout and stderr, of child processes too, to a file until the block ends.

    Yields a stream to the previous stderr, for output that people should see. The file is removed
    at the end if it is empty.

    :raises Refused: the file or its folder cannot be created.
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
            with _redirected(_STDOUT, file.fileno()), _redirected(_STDERR, file.fileno()):
                yield terminal
        finally:
            if not os.fstat(file.fileno()).st_size:
                log.unlink(missing_ok=True)


@contextlib.contextmanager
def _redirected(fd: int, target_fd: int) -> Iterator[None]:
    # The descriptor itself is replaced, not sys.stdout or sys.stderr: Ray's C++ writes its log
    # to descriptor 2 from its own threads, and child processes inherit descriptors.
    _flush()
    before = _duplicate(fd)
    os.dup2(target_fd, fd)
    try:
        yield
    finally:
        _flush_or_discard(target_fd)
        os.dup2(before, fd)
        os.close(before)


def _flush_or_discard(log_fd: int) -> None:
    """Flush buffered output into the log; discard it if it cannot be written (disk full)."""
    try:
        _flush()
    except OSError:
        # This error must not be raised: it would hide the error that ends the block. The output
        # must not stay in the buffers: it would appear on the real stdout and stderr later.
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (_STDOUT, _STDERR):
            if os.path.sameopenfile(fd, log_fd):
                os.dup2(null, fd)
        os.close(null)
        _flush()


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:  # this process was started with the descriptor closed
        return os.open(os.devnull, os.O_WRONLY)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()

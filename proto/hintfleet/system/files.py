"""Reads and writes files whose paths users give, and writes settings of the kernel."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def read_at_most(path: str | Path, most_bytes: int) -> bytes:
    """Read a whole small file.

    :raises OSError: it cannot be read, is a directory, or is larger than `most_bytes` (EFBIG).
    """
    with open(path, "rb", opener=_open_at_once) as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(most_bytes + 1)  # bounded: a device such as /dev/zero never ends
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", os.fspath(path))
    return content


def write_kernel_file(path: Path, text: str) -> None:
    """Write a setting to a file of /sys or of a cgroup, which is there already.

    :raises OSError: the kernel refused it, or there is no such file; with the file's name.
    """
    # Not write_text: for a missing file it asks the kernel to make one, and so gets EACCES, not
    # ENOENT.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe that has no writer blocks until a writer opens it
    # (fifo(7)). With O_NONBLOCK, it opens at once, and a read returns end of file.
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write to. When the block ends without an error, it gets the name `path`
    and replaces an old file of this name; after an error, it is removed, and the old file stays. If
    `path` is a symbolic link, this is about the file that it points to.

    Where the file system has O_TMPFILE, nothing is left of the new file either if this process is
    killed in the block.

    :raises OSError: it cannot be made, synced or renamed, or `path` is something else than a file:
        a device, for example, must not be replaced.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    aside = target.with_name(f".hintfleet-{uuid.uuid4().hex}.unfinished")
    try:
        with open(aside, "xb", opener=_open_nameless) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not aside.exists():
                _name(file.fileno(), aside)
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)


def _open_nameless(path: str, flags: int) -> int:
    """Open a new file without a name in the folder of `path`; where the file system cannot do that,
    open a new file with the name `path`."""
    try:
        return os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        return os.open(path, flags, 0o666)


def _name(fd: int, path: Path) -> None:
    """Give a file without a name a name that is not there yet."""
    # As open(2) says of O_TMPFILE. Only with `src_dir_fd`, which an absolute path ignores, does
    # Python call linkat(2) with AT_SYMLINK_FOLLOW; link(2) would link the symbolic link itself
    # (python/cpython#81793).
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)

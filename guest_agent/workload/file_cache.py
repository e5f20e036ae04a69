"""The page cache of a real guest: filled by reading a file, and dropped.

The file is one hole. Reading it reads nothing from the disk, but each page takes a page of the page
cache, which the kernel keeps until it needs the memory. These pages hold zeros, and are not
verified.
"""

from __future__ import annotations

import os
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.units import MIB

# deploy/image/rootfs.py makes this file, because the disk of our guest image is read-only.
_FILE = Path("/var/lib/hintfleet/cached")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_READ_BYTES = MIB


class FileCache:
    """Fills and drops the page cache."""

    def __init__(self, path: Path = _FILE, drop_caches: Path = _DROP_CACHES) -> None:
        """:param path: a file on a disk, not on a tmpfs (whose pages `drop` does not free). `read`
        makes it if it is missing, and extends it if it is too short."""
        self._path = path
        self._drop_caches = drop_caches

    def read(self, size_bytes: int) -> None:
        """Read the first `size_bytes` of the file, so that the page cache holds them.

        :raises Refused: the file cannot be made, or cannot be read.
        """
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            self._make(size_bytes)
            with open(self._path, "rb", buffering=0) as file:
                while size_bytes > 0 and (read := file.readinto(buffer[:size_bytes])):
                    size_bytes -= read
        except OSError as error:
            raise Refused(f"cannot read {self._path}: {error.strerror}") from error

    def _make(self, size_bytes: int) -> None:
        if self._path.exists() and self._path.stat().st_size >= size_bytes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab") as file:
            file.truncate(size_bytes)

    def drop(self) -> None:
        """Have the kernel drop all that it can: pages of files, and slabs of inodes and names.

        :raises Refused: this process may not, because it does not run as root.
        """
        os.sync()  # pages that are not written back yet cannot be dropped
        try:
            # 3: pages of files and slabs (Documentation/admin-guide/sysctl/vm.rst).
            self._drop_caches.write_text("3\n")
        except OSError as error:
            raise Refused(f"cannot write to {self._drop_caches}: {error.strerror}") from error

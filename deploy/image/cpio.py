"""Archives in the kernel's initramfs format, made without root.

Format: Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file, directory, symlink or device of an archive, owned by root.

    :ivar path: without a leading slash.
    :ivar mode: type and permissions, as in st_mode.
    :ivar data: a file's content or a symlink's target.
    :ivar device: major and minor number of a device.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """Return an entry for a directory that everybody may read."""
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """Return an entry for a file."""
    return Entry(path=path, mode=stat.S_IFREG | permissions, data=data)


def symlink(path: str, target: str) -> Entry:
    """Return an entry for a symbolic link."""
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def tree(source: Path, under: str) -> Iterator[Entry]:
    """Yield entries for `under` and for all that is below `source`, with paths below `under`."""
    yield directory(under)
    for path in sorted(source.rglob("*")):
        name = str(PurePosixPath(under, path.relative_to(source).as_posix()))
        yield directory(name) if path.is_dir() else file(name, path.read_bytes())


def archive(entries: Iterator[Entry]) -> bytes:
    """Return the archive of `entries`; a directory must come before its files."""
    out = bytearray()
    for number, entry in enumerate(entries, 1):
        _append(out, number, entry)
    _append(out, 0, Entry(path="TRAILER!!!", mode=0))
    return bytes(out)


def _append(out: bytearray, number: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(number, entry.mode, 0, 0, links, 0, len(entry.data)),  # inode to file size, see "newc"
        *(0, 0, *entry.device, len(name), 0),  # containing device, device, name size, checksum
    )
    out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
    _pad(out)
    out += entry.data
    _pad(out)


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % 4)

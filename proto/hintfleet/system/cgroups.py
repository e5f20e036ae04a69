"""Finds the cgroups of this process: v1 and v2 (cgroups(7)).

Some folders may not exist: in a container, /proc/self/cgroup may name a path of the container's
host. All files are read below a given root, for tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """A hierarchy of cgroups that is mounted on this machine.

    :ivar controllers: of v1, for example `memory`, or `name=systemd`; of v2, none.
    :ivar top: folder of the topmost cgroup that this process can see.
    :ivar own: folder of this process's cgroup, `top` or below it; `top` if it cannot be found.
    """

    controllers: frozenset[str]
    top: PurePosixPath
    own: PurePosixPath

    @property
    def is_v2(self) -> bool:
        """Whether this is the hierarchy of v2."""
        return not self.controllers

    def from_the_top(self) -> Iterator[PurePosixPath]:
        """Yield the folders of this process's cgroup and of those above it, from the top."""
        rest = self.own.relative_to(self.top)
        yield from reversed([self.top / part for part in (rest, *rest.parents)])


def hierarchies(root: Path = _ROOT) -> Iterator[Hierarchy]:
    """Yield the mounted hierarchies, in the order of /proc/self/cgroup."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number != "0" and not names:
            continue
        controllers = frozenset(names.split(",")) if names else frozenset()
        own, mounts = PurePosixPath(path), list(_mounts(controllers, root))
        inside = [(at, own.relative_to(top)) for top, at in mounts if own.is_relative_to(top)]
        # If no mount's root is a prefix of our path, take the mount point of the first mount: it is
        # our cgroup or one above. That happens if the mount was made outside of our cgroup
        # namespace (its root is a path like /..), or if its root is a path of a container's host.
        for at, rest in inside[:1] or [(at, PurePosixPath()) for _, at in mounts[:1]]:
            yield Hierarchy(controllers=controllers, top=at, own=at / rest)


def _mounts(
    controllers: frozenset[str], root: Path
) -> Iterator[tuple[PurePosixPath, PurePosixPath]]:
    """Yield root and mount point of each mount of a hierarchy (mountinfo, proc(5)).

    :param controllers: those of the hierarchy; none for v2.
    """
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        found, _, options = filesystem.split(" ", 2)
        is_v1 = found == "cgroup" and controllers & set(options.split(","))
        if is_v1 or (found == "cgroup2" and not controllers):
            top, at = mount.split()[3:5]
            yield PurePosixPath(_unescaped(top)), PurePosixPath(_unescaped(at))


def _unescaped(path: str) -> str:
    # mountinfo writes spaces, tabs, newlines and backslashes as octal numbers (proc(5)).
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), path)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

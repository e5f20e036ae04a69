"""The user that QEMU runs as, and which files it can access.

Under qemu:///system QEMU has its own user (qemu.conf: `user`), who often has no right to enter a
home folder or a private TMPDIR.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import stat
import struct
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused

_READ, _ENTER = 4, 1
_ACL = "system.posix_acl_access"
# Tags of the entries of an access list (linux/posix_acl.h) that are read here. The rights of owner
# and others are read from the mode.
_USER, _GROUP_OBJ, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10


@dataclass(frozen=True, kw_only=True)
class QemuUser:
    """The user that QEMU runs as, without privileges.

    :ivar gids: ids of all its groups.
    """

    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, capabilities: str) -> QemuUser | None:
        """Return QEMU's user from libvirt's capabilities (XML); None if QEMU runs as the user who
        starts it, or as root.
        """
        # Root is left out, because nobody knows which privileges a QEMU that runs as root keeps
        # (qemu.conf: clear_emulator_capabilities).
        for model in ET.fromstring(capabilities).findall("host/secmodel"):  # noqa: S314 - libvirt's
            label = re.fullmatch(r"\+(\d{1,10}):\+(\d{1,10})", model.findtext("baselabel") or "")
            if model.findtext("model") == "dac" and label and int(label[1]):
                uid, gid = int(label[1]), int(label[2])
                return cls(uid=uid, gids=frozenset((gid, *_groups(uid, gid))))
        return None

    @property
    def name(self) -> str:
        """The user's name, or the uid if it has no name."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    def check(self, path: Path, alternative: str) -> None:
        """Check that the user can read a file, or enter a folder.

        :param alternative: for the hint: what to do instead of giving the user access.
        :raises Refused: it cannot; names the folder or file that denies access.
        """
        denied = self.first_denied(path)
        if denied is None:
            return
        right = "x" if denied.is_dir() else "r"
        raise Refused(
            f"{denied} denies access to QEMU's user {self.name} (mode "
            f"{stat.S_IMODE(denied.stat().st_mode):04o}), who needs {path}",
            hint=f"give it access (chmod o+{right} {denied}; to this user only: setfacl -m "
            f"u:{self.name}:{right} {denied}), or {alternative}",
        )

    def first_denied(self, path: Path) -> Path | None:
        """Return the first folder on the way to `path` that the user has no right to enter. If
        there is none, return what `path` leads to (links resolved) if the user has no right to
        read that file or enter that folder; else None."""
        # The folders above the path as given, and those above what its links lead to: the user
        # must be able to enter all of them.
        real = path.resolve()
        way = dict.fromkeys((*reversed(path.absolute().parents), *reversed(real.parents)))
        for folder in way:
            if not self._has_right(folder, _ENTER):
                return folder
        return None if self._has_right(real, _ENTER if real.is_dir() else _READ) else real

    def _has_right(self, path: Path, right: int) -> bool:
        """Return whether the user has this right on one file or folder; true if that cannot be
        found out."""
        # acl(5), "access check algorithm". Without a list, the mode's bits decide.
        try:
            status = path.stat()
            # Linux ignores an access list with an empty mask. The mode's bits for the group are
            # that mask: acl_permission_check() in fs/namei.c.
            entries = _acl(path) if status.st_mode & stat.S_IRWXG else []
        except OSError:
            return True  # if access is denied after all, QEMU reports it
        if status.st_uid == self.uid:
            return bool(status.st_mode >> 6 & right)
        mask = next((bits for tag, bits, _ in entries if tag == _MASK), 7)
        for tag, bits, number in entries:
            if tag == _USER and number == self.uid:
                return bool(bits & mask & right)
        groups = [bits for tag, bits, number in entries if tag == _GROUP and number in self.gids]
        if status.st_gid in self.gids:
            # With a list, the rights of the file's group are in the entry _GROUP_OBJ: the mode's
            # group bits are the mask.
            own = (bits for tag, bits, _ in entries if tag == _GROUP_OBJ)
            groups.append(next(own, status.st_mode >> 3))
        if groups:
            return any(bits & mask & right for bits in groups)
        return bool(status.st_mode & right)


def _groups(uid: int, gid: int) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return []


def _acl(path: Path) -> list[tuple[int, int, int]]:
    """Return tag, rights and user or group id of each entry of a file's access list; an empty list
    if there is no access list."""
    try:
        value = os.getxattr(path, _ACL)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return []
        raise
    # A header with the version, then entries: linux/posix_acl_xattr.h, little endian.
    return list(struct.iter_unpack("<HHI", value[4:]))

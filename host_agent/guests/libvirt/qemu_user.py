"""The user that QEMU runs as, and which files it can get at.

Under qemu:///system that is a user of its own (qemu.conf: `user`), whom a home folder or a
private TMPDIR keeps out.
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
_USER, _GROUP_OBJ, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10
"""Tags of entries of an access list (linux/posix_acl.h); owner and others are in the mode."""


@dataclass(frozen=True, kw_only=True)
class QemuUser:
    """A user without privileges.

    :ivar gids: of all its groups.
    """

    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, capabilities: str) -> QemuUser | None:
        """By libvirt's capabilities; None where QEMU runs as whoever asks for it, or as root,
        of whom nobody knows which privileges it keeps (qemu.conf: clear_emulator_capabilities).
        """
        for model in ET.fromstring(capabilities).findall("host/secmodel"):  # noqa: S314 - libvirt's
            label = re.fullmatch(r"\+(\d{1,10}):\+(\d{1,10})", model.findtext("baselabel") or "")
            if model.findtext("model") == "dac" and label and int(label[1]):
                uid, gid = int(label[1]), int(label[2])
                return cls(uid=uid, gids=frozenset((gid, *_groups(uid, gid))))
        return None

    @property
    def name(self) -> str:
        """Its name, or its number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    def check(self, path: Path, instead: str) -> None:
        """Refuse what QEMU would fail at, with less to go by.

        :param path: a file to be read, or a folder in which it is to get at files.
        :param instead: what else can be done than to let it in.
        :raises Refused: it cannot; names the folder or file that keeps it out.
        """
        barrier = self.barrier(path)
        if barrier is None:
            return
        right = "x" if barrier.is_dir() else "r"
        raise Refused(
            f"{barrier} keeps QEMU's user {self.name} out (mode "
            f"{stat.S_IMODE(barrier.stat().st_mode):04o}), and so from {path}",
            hint=f"let it in (chmod o+{right} {barrier}; for it alone setfacl -m "
            f"u:{self.name}:{right} {barrier}), or {instead}",
        )

    def barrier(self, path: Path) -> Path | None:
        """The first folder on the way that it may not enter, or the file, which it may not read;
        None if nothing is in its way."""
        real = path.resolve()
        way = dict.fromkeys((*reversed(path.absolute().parents), *reversed(real.parents)))
        for folder in way:
            if not self._may(folder, _ENTER):
                return folder
        return None if self._may(real, _ENTER if real.is_dir() else _READ) else real

    def _may(self, path: Path, right: int) -> bool:
        """As acl(5) says, access check algorithm; without a list it is the mode's bits.

        What cannot be looked at is allowed: QEMU will say.
        """
        try:
            status = path.stat()
            # Linux does not look at a list whose mask, the mode's bits for the group, is empty:
            # acl_permission_check() in fs/namei.c.
            entries = _acl(path) if status.st_mode & stat.S_IRWXG else []
        except OSError:
            return True
        if status.st_uid == self.uid:
            return bool(status.st_mode >> 6 & right)
        mask = next((bits for tag, bits, _ in entries if tag == _MASK), 7)
        for tag, bits, number in entries:
            if tag == _USER and number == self.uid:
                return bool(bits & mask & right)
        groups = [bits for tag, bits, number in entries if tag == _GROUP and number in self.gids]
        if status.st_gid in self.gids:
            # With a list, the mode's bits for the group are its mask.
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
    """Tag, rights and number of each entry; none if there is no access list."""
    try:
        value = os.getxattr(path, _ACL)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return []
        raise
    # A header with the version, then entries: linux/posix_acl_xattr.h, little endian.
    return list(struct.iter_unpack("<HHI", value[4:]))

"""Whether QEMU's user may reach a file: modes and access lists decide as in the kernel. Also how
QEMU's user is read from libvirt's capabilities."""

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hintfleet.errors import Refused
from host_agent.guests.libvirt.qemu_user import QemuUser

UID, GID, OTHER_GID = 64055, 64055, 107
USER = QemuUser(uid=UID, gids=frozenset((GID, OTHER_GID)))
NOBODY = 0xFFFFFFFF

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that every user can enter; pytest's `tmp_path` denies that."""
    with tempfile.TemporaryDirectory(prefix="hf-acl-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def as_user(path: Path) -> bool:
    """Return whether the kernel lets USER enter the folder `path`, or read the file `path`."""
    test = "-x" if path.is_dir() else "-r"
    command = ["test", test, str(path / ".") if path.is_dir() else str(path)]
    done = subprocess.run(command, user=UID, group=GID, extra_groups=[OTHER_GID], check=False)
    return done.returncode == 0


def set_acl(path: Path, entries: list[tuple[int, int, int]]) -> None:
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)


def test_the_folder_that_denies_access_is_named(folder: Path) -> None:
    file = folder / "home/cache/root.img"
    file.parent.mkdir(parents=True)
    file.touch(0o644)
    assert USER.first_denied(file) is None
    (folder / "home").chmod(0o700)
    with pytest.raises(
        Refused, match=f"{folder}/home denies access to QEMU's user .*mode 0700.*root.img"
    ):
        USER.check(file, "do something else")
    (folder / "home").chmod(0o711)
    file.chmod(0o600)
    with pytest.raises(Refused) as caught:
        USER.check(file, "do something else")
    assert f"chmod o+r {file}" in caught.value.hint
    assert caught.value.hint.endswith("or do something else")


def test_a_link_is_followed_from_both_ends(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
    (folder / "b/file").touch()
    (folder / "a/link").symlink_to(folder / "b/file")
    assert USER.first_denied(folder / "a/link") is None
    (folder / "a").chmod(0o700)
    assert USER.first_denied(folder / "a/link") == folder / "a"
    (folder / "a").chmod(0o711)
    (folder / "b").chmod(0o700)
    assert USER.first_denied(folder / "a/link") == folder / "b"


MODES = st.integers(0, 0o777)
RIGHTS = st.integers(0, 7)


@root_only
@settings(max_examples=60, deadline=None)
@given(
    mode=MODES,
    owner=st.sampled_from((0, UID)),
    group=st.sampled_from((0, GID, OTHER_GID)),
    users=st.dictionaries(st.sampled_from((UID, 1)), RIGHTS),
    groups=st.dictionaries(st.sampled_from((GID, OTHER_GID, 1)), RIGHTS),
    mask=RIGHTS,
    is_folder=st.booleans(),
)
# The kernel ignores an access list with an empty mask.
@example(mode=4, owner=0, group=0, users={}, groups={GID: 0}, mask=0, is_folder=False)
def test_rights_are_as_the_kernel_says(
    mode: int,
    owner: int,
    group: int,
    users: dict[int, int],
    groups: dict[int, int],
    mask: int,
    is_folder: bool,
) -> None:
    with tempfile.TemporaryDirectory(prefix="hf-acl-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        path = Path(made) / "it"
        path.mkdir() if is_folder else path.touch()
        os.chown(path, owner, group)
        path.chmod(mode)
        if users or groups:
            set_acl(
                path,
                [
                    (0x01, mode >> 6, NOBODY),
                    *((0x02, bits, uid) for uid, bits in sorted(users.items())),
                    (0x04, mode >> 3 & 7, NOBODY),
                    *((0x08, bits, gid) for gid, bits in sorted(groups.items())),
                    (0x10, mask, NOBODY),
                    (0x20, mode & 7, NOBODY),
                ],
            )
        assert (USER.first_denied(path) is None) == as_user(path)


SECMODEL = "<capabilities><host><secmodel><model>none</model></secmodel>{}</host></capabilities>"
DAC = "<secmodel><model>dac</model><baselabel type='kvm'>{}</baselabel></secmodel>"


@pytest.mark.parametrize(
    ("models", "uid"),
    [
        ("", None),  # qemu:///session, where QEMU runs as the user who connects
        (DAC.format("+0:+0"), None),  # root: QEMU's privileges are not known
        (DAC.format("+64055:+107"), 64055),
    ],
)
def test_qemus_user_is_read_from_capabilities(models: str, uid: int | None) -> None:
    found = QemuUser.of(SECMODEL.format(models))
    assert (found.uid if found else None) == uid
    assert found is None or 107 in found.gids

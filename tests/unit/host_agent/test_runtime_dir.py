"""A guest's files lie where QEMU's user can reach them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent.guests.libvirt.qemu_user import QemuUser
from host_agent.guests.libvirt.runtime_dir import RuntimeDir, runtime_dirs

USER = QemuUser(uid=64055, gids=frozenset((64055,)))
EVERYBODYS = Path("/tmp")  # noqa: S108


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder that only this user can enter, and make it the one for temporary files."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_the_temporary_folder_if_it_can_be_entered(private: Path) -> None:
    private.chmod(0o711)
    made = RuntimeDir.make(USER)
    try:
        assert made.path.parent == private
        assert USER.first_denied(made.path) is None
    finally:
        made.remove()


def test_the_shared_folder_if_not(private: Path) -> None:
    made = RuntimeDir.make(USER)
    try:
        assert made.path.parent == EVERYBODYS
        assert USER.first_denied(made.path) is None
    finally:
        made.remove()
    made = RuntimeDir.make(None)  # None: QEMU runs as this user
    assert made.path.parent == private
    made.remove()


def test_both_are_looked_at_for_what_was_left(private: Path) -> None:
    assert [dirs.base for dirs in runtime_dirs()] == [private, EVERYBODYS]

"""Which folder may hold the default socket."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hintfleet.errors import Refused
from hintfleet.net.addresses import SHARED_FOLDER
from host_agent.__main__ import _parser, _refuse_if_not_ours, _serve

UID = 61234
"""Of no user."""


def test_a_folder_of_ours_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "hintfleet-0" / "hintfleet"
    folder.mkdir(parents=True, mode=0o777)
    _refuse_if_not_ours(folder, tmp_path)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    assert tmp_path.stat().st_mode & 0o777 == 0o700, "the mode of pytest's folder is unchanged"


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Whoever made the link could change its target, and so put a socket of his own in place of
    ours."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "hintfleet-0").symlink_to(tmp_path / "theirs")
    folder = tmp_path / "hintfleet-0" / "hintfleet"
    folder.mkdir()
    with pytest.raises(Refused, match="hintfleet-0 is not a folder of this user"):
        _refuse_if_not_ours(folder, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hintfleet-0" / "hintfleet"
    folder.mkdir(parents=True)
    os.chown(folder.parent, 1, 1)
    with pytest.raises(Refused, match="is not a folder of this user"):
        _refuse_if_not_ours(folder, tmp_path)


@pytest.fixture
def their_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be the user UID, whose default folder somebody else has made; yield the folder above that."""
    folder = SHARED_FOLDER / f"hintfleet-{UID}"
    (folder / "hintfleet").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: UID)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    yield folder
    shutil.rmtree(folder)


def test_the_default_folder_is_looked_at_wherever_temporary_files_are(
    their_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/elsewhere")
    # With this TLS folder, `_serve` fails even if it accepts the default folder.
    arguments = _parser().parse_args(["--tls", "/nowhere"])
    with pytest.raises(Refused, match=f"{their_folder}/hintfleet is not a folder of this user"):
        asyncio.run(_serve(arguments))


def test_a_folder_elsewhere_is_not_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "hintfleet"
    folder.mkdir(parents=True, mode=0o755)
    _refuse_if_not_ours(folder, tmp_path / "tmp")
    assert folder.stat().st_mode & 0o777 == 0o755

"""Errors, commands, hashes and layers, shared by the steps of the image builder (and by
kmod/check_kernels.py).

The builder must run where hintfleet is not installed: it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
BUILDING = ".building-"
"""How the names of directories begin that are being made or removed."""

_INSTALL = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "tar": "tar",
}


class BuildError(Exception):
    """A build failed; the message names what failed and, if known, what to try."""


def require_tools() -> None:
    """Check that mmdebstrap, mke2fs and tar are installed.

    :raises BuildError: some are missing; the message names them and their Debian packages.
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [tool for tool in _INSTALL if not shutil.which(tool, path=path)]
    if missing:
        packages = " ".join(_INSTALL[tool] for tool in missing)
        raise BuildError(
            f"the image builder needs {', '.join(missing)}\n  try: apt-get install {packages}"
        )


def run(command: Sequence[str | Path]) -> None:
    """Run a command without printing its output.

    :raises BuildError: it failed; the message has the last lines of its output.
    """
    env = os.environ | {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise BuildError(f"{command[0]} failed with exit status {done.returncode}:\n{tail}")


def mmdebstrap(
    target: Path | None,
    packages: Sequence[str],
    hooks: Sequence[tuple[str, str]],
    variant: str,
) -> None:
    """Make a Debian tree with `packages`, and run `hooks` on it.

    The caller need not be root: the files of such a tree have several owners, and for an ordinary
    user mmdebstrap makes them in a user namespace.

    :param target: tar file to write the tree to; None to drop the tree after the hooks.
    :param hooks: stage of mmdebstrap and command, for each hook.
    :param variant: which packages besides `packages`: see mmdebstrap's --variant.
    :raises BuildError: mmdebstrap failed.
    """
    run(
        [
            "mmdebstrap",
            f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
            f"--variant={variant}",
            f"--format={'tar' if target else 'null'}",
            f"--include={','.join(packages)}",
            "--aptopt=APT::Install-Recommends false",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            *(f"--{stage}-hook={hook}" for stage, hook in hooks),
            SUITE,
            target or "-",
        ]
    )


def digest(parts: Iterable[str | Path]) -> str:
    """Return a hash of `parts` in their order: strings, and files by name and content."""
    total = hashlib.sha256()
    for part in parts:
        data = f"{part.name}\0".encode() + part.read_bytes() if isinstance(part, Path) else part
        total.update(hashlib.sha256(data.encode() if isinstance(data, str) else data).digest())
    return total.hexdigest()[:16]


def build_once(directory: Path, marker: str, build: Callable[[Path], None]) -> Path:
    """Return `directory`; it is made by `build` unless it is there, with the file `marker`.

    `build` fills another directory, which is then renamed. So two builders may run at once. The
    directory's time becomes now: so no builder removes it soon.

    :raises OSError: `directory` has files, but no `marker`.
    """
    with contextlib.suppress(FileNotFoundError):  # it is not there, or is just being removed
        os.utime(directory)
        (directory / marker).stat()
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=BUILDING) as temporary:
        aside = Path(temporary) / "layer"
        aside.mkdir()
        build(aside)
        try:
            aside.rename(directory)
        except OSError:
            if not (directory / marker).exists():
                raise
    return directory


def remove(directory: Path) -> None:
    """Remove a directory that `build_once` made: at no time a part of it is there."""
    with (
        tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=BUILDING, ignore_cleanup_errors=True
        ) as aside,
        contextlib.suppress(FileNotFoundError),  # another builder removes it, too
    ):
        directory.rename(Path(aside, directory.name))


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")

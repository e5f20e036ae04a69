"""The image's second layer: a read-only root file system with Python and gRPC.

All guests that use the image share it. It does not contain the agent itself, which is in the
initrd: so a change to the agent needs no new disk.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from common import SUITE, TREE, BuildError, build_once, digest, mmdebstrap, run, write_json

PYTHON = (3, 11)
PACKAGES = ("python3", "libstdc++6")
"""libstdc++6 is what gRPC's extension module links to."""

WHEELS = ("grpcio", "protobuf", "typing-extensions")
"""All that the agent's base dependencies need; installed without looking for more."""

AGENT_PATH = "/opt/hintfleet"
_SITE = f"/usr/local/lib/python{PYTHON[0]}.{PYTHON[1]}/dist-packages"
_SPARE_BYTES = 16 << 20

# A file that workloads read to fill the page cache (guest_agent/workload/file_cache.py). It is one
# hole: it takes no space on the disk.
_CACHED = "var/lib/hintfleet/cached"
_CACHED_BYTES = 64 << 30

# $1 is the tree. Importing gRPC there fails if the wheels do not fit its Python and libraries.
_FINISH = f"""
set -eu
chroot "$1" python3 -m compileall -q {_SITE}
chroot "$1" python3 -c 'import grpc, google.protobuf.message'
chroot "$1" python3 -c 'import importlib.util as u; print(u.MAGIC_NUMBER.hex())' > "$1/tmp/magic"
mkdir -p "$1{AGENT_PATH}"
"""


def pins(constraints: str) -> list[str]:
    """Return `name==version` for each of WHEELS, from the text of a pip constraints file.

    :raises BuildError: one is not pinned there.
    """
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower(): f"{name}=={version}"
        for name, version in re.findall(r"^\s*([\w.-]+)==([^\s;#]+)", constraints, re.M)
    }
    missing = [name for name in WHEELS if name not in pinned]
    if missing:
        raise BuildError(f"constraints.txt pins no version of {', '.join(missing)}")
    return [pinned[name] for name in WHEELS]


def rootfs(layers: Path, more_packages: Sequence[str] = ()) -> Path:
    """Return the directory with root.img and root.json; build it if it is not there.

    root.json has `magic`, the magic number of .pyc files of the guest's Python in hex, and
    `wheels`, the `name==version` of what was installed.

    :param more_packages: Debian packages to install besides PACKAGES.
    :raises BuildError: a step failed.
    """
    wheels = pins((TREE / "constraints.txt").read_text())
    packages = (*PACKAGES, *more_packages)
    key = digest([SUITE, *packages, *wheels, Path(__file__)])
    return build_once(layers / f"root-{key}", "root.json", lambda to: _build(to, packages, wheels))


def _build(to: Path, packages: Sequence[str], wheels: Sequence[str]) -> None:
    site = to / "site"
    _install_wheels(site, wheels)
    hooks = [
        ("customize", f'mkdir -p "$1{_SITE}"'),
        ("customize", f"sync-in {site} {_SITE}"),
        ("customize", _FINISH),
        ("customize", f"copy-out /tmp/magic {to}"),
        ("customize", 'rm -rf "$1/tmp/magic" "$1/var/cache" "$1/var/lib/apt" "$1/boot"'),
    ]
    mmdebstrap(to / "root.tar", packages, hooks, "essential")
    _make_disk(to / "root.tar", to / "root.img")
    magic = (to / "magic").read_text().strip()
    shutil.rmtree(site)
    for done in ("root.tar", "magic"):
        (to / done).unlink()
    write_json(to / "root.json", {"magic": magic, "wheels": list(wheels)})


def _install_wheels(site: Path, wheels: Sequence[str]) -> None:
    """Install wheels for the guest's Python into `site`, whatever Python runs this."""
    platforms = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"),
            *("--target", site, "--only-binary=:all:", "--implementation=cp"),
            f"--python-version={PYTHON[0]}.{PYTHON[1]}",
            *(f"--platform={platform}" for platform in platforms),
            *wheels,
        ]
    )


def _make_disk(tar: Path, disk: Path) -> None:
    """Make the ext4 file system `disk`, without mounting it. It has what is in `tar`, except the
    files in /dev. It also has the file _CACHED.

    If the caller is not root, the files belong to the caller's user instead of root. That does not
    matter: in the guest only root uses them, and the file system is read-only.
    """
    tree = disk.with_suffix(".tree")
    tree.mkdir()
    run(["tar", "-x", "-f", tar, "-C", tree, "--exclude=./dev/*"])
    used = sum(-(-path.lstat().st_size // 4096) * 4096 + 512 for path in tree.rglob("*"))
    blocks = (used * 21 // 20 + _SPARE_BYTES) // 4096
    cached = tree / _CACHED
    cached.parent.mkdir(parents=True)
    with open(cached, "wb") as file:
        file.truncate(_CACHED_BYTES)
    run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "hintfleet"),
            *("-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0"),
            *("-d", tree, disk, str(blocks)),
        ]
    )
    _remove(tree)


def _remove(tree: Path) -> None:
    """Remove an extracted tree, which may contain directories without write permission."""
    for parent, names, _ in os.walk(tree):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(tree)

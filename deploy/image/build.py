#!/usr/bin/env python3
"""Builds the guest image: kernel, initrd and a read-only root disk.

    python3 deploy/image/build.py [--print-path] [--variant NAME] [--package NAME ...]

The image is kept outside the tree, in a directory named by a hash of its inputs in this tree and of
the names of its packages, and reused while they do not change (newer Debian packages are not
noticed). The base directory (DIR) is HINTFLEET_IMAGE_DIR; by default
/var/cache/hintfleet/images for root (QEMU runs as another user and must be able to read it) and
hintfleet/images in the XDG cache directory for others.

    DIR/layers/kit-HASH/     kernel, modules, shell; built (minutes) if our module or kit.py changed
    DIR/layers/root-HASH/    root disk; built (minutes) if wheels, packages or rootfs.py changed
    DIR/HASH/                the image: root.img vmlinuz initrd.img image.json
    DIR/current              a link to the image of variant `current` that was built or reused last,
                             without --package; before the first one, to that of another variant
    DIR/compiler             the same for --variant compiler, and so for each variant

A build removes all images except those that such links name and the KEPT_IMAGES others that builds
used last. It also removes the layers that no image uses and that are older than a day. A running
guest does not need its image any more: QEMU has the disk open, and has read the other files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import py_compile
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cpio
from common import (
    BUILDING,
    SUITE,
    TREE,
    BuildError,
    build_once,
    digest,
    remove,
    require_tools,
    write_json,
)
from kit import kit
from rootfs import rootfs

PACKAGES = (("hintfleet", TREE / "proto/hintfleet"), ("guest_agent", TREE / "guest_agent"))
INIT = Path(__file__).with_name("init")
BUILDER = tuple(Path(__file__).with_name(f"{name}.py") for name in ("build", "common", "cpio"))
VARIANTS = {"current": (), "compiler": ("g++",)}
"""More Debian packages of each variant. A spec names it: `guests: {image: compiler}`."""

KEPT_IMAGES = 8
KEPT_LAYERS_S = 24 * 3600
COMMANDS = ("chroot", "cat", "echo", "insmod", "ip", "mount", "poweroff", "rm", "sed", "sh")


def image_dir(environ: dict[str, str], is_root: bool) -> Path:
    """Return the base directory: HINTFLEET_IMAGE_DIR, or the default for this user."""
    if chosen := environ.get("HINTFLEET_IMAGE_DIR"):
        return Path(chosen).absolute()
    if is_root:
        return Path("/var/cache/hintfleet/images")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ["HOME"], ".cache")
    return Path(cache, "hintfleet/images")


def build(images: Path, variant: str = "current", packages: Sequence[str] = ()) -> Path:
    """Build this tree's image if it is not there, and return its directory.

    :param packages: more Debian packages for the root disk. If there are none, the link with the
        name of the variant points to the image afterwards, and so does `current` if that link was
        missing. If there are some, no link is changed.
    :raises BuildError: a step failed; earlier images are still there.
    """
    sources = [path for _, package in PACKAGES for path in _sources(package)]
    layers = (kit(images / "layers"), rootfs(images / "layers", (*VARIANTS[variant], *packages)))
    names = [str(path.relative_to(TREE)) for path in sources]
    key = digest([*(layer.name for layer in layers), *names, *sources, INIT, *BUILDER])
    image = build_once(images / key, "image.json", lambda to: _assemble(to, key, *layers))
    if not packages:
        _point(images / variant, key)
        if not (images / "current").exists():
            _point(images / "current", key)  # other variants have all that `current` has
    prune(images)
    return image


def prune(images: Path) -> None:
    """Remove all images except those that links name and the KEPT_IMAGES others that builds used
    last. Also remove layers that no image uses and that are older than KEPT_LAYERS_S.

    Younger layers are kept, because another builder may be about to make an image of one.
    """
    there = [path.parent for path in images.glob("*/image.json")]
    linked = {image.resolve() for image in there if image.is_symlink()}
    ours = [image for image in there if not image.is_symlink() and image.resolve() not in linked]
    ours.sort(key=lambda image: image.stat().st_mtime, reverse=True)
    for image in ours[KEPT_IMAGES:]:
        remove(image)
    # Also what a killed builder left.
    for layer in (*images.glob("layers/*-*"), *images.glob(f"{BUILDING}*")):
        with contextlib.suppress(FileNotFoundError):  # another builder removes it
            # An image that uses a layer has hard links to files of that layer.
            is_used = any(file.stat().st_nlink > 1 for file in layer.iterdir() if file.is_file())
            if not is_used and time.time() - layer.stat().st_mtime > KEPT_LAYERS_S:
                remove(layer)


def _sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def _assemble(to: Path, key: str, kit_layer: Path, root_layer: Path) -> None:
    kit_facts = json.loads((kit_layer / "kit.json").read_text())
    root_facts = json.loads((root_layer / "root.json").read_text())
    os.link(root_layer / "root.img", to / "root.img")
    os.link(kit_layer / "vmlinuz", to / "vmlinuz")
    compiled = root_facts["magic"] == importlib.util.MAGIC_NUMBER.hex()
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary)
        _stage_agent(code, compiled)
        (to / "initrd.img").write_bytes(cpio.archive(_initrd(kit_layer, kit_facts["load"], code)))
    write_json(
        to / "image.json",
        {
            "inputs": key,
            "suite": SUITE,
            "kernel": kit_facts["kernel"],
            "kernel_package": kit_facts["kernel_package"],
            "wheels": root_facts["wheels"],
            "agent_compiled": compiled,
            "built_unix_s": int(time.time()),
        },
    )


def _stage_agent(to: Path, compiled: bool) -> None:
    """Copy the .py files of the agent's Python packages to `to`.

    :param compiled: whether to add .pyc files: only if this Python writes the guest's .pyc format.
        The guest uses them without a look at the sources (UNCHECKED_HASH): nobody edits sources in
        the guest, and in the initrd (cpio.py) all files have the time 0, so that .pyc files checked
        by time would be rejected.
    """
    for name, package in PACKAGES:
        for source in _sources(package):
            target = to / name / source.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            if compiled:
                py_compile.compile(
                    str(target),
                    dfile=f"{name}/{source.relative_to(package)}",
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )


def _initrd(kit_layer: Path, load: list[str], code: Path) -> Iterator[cpio.Entry]:
    for name in ("bin", "dev", "mnt", "proc", "sys"):
        yield cpio.directory(name)
    # The kernel opens /dev/console for init before devtmpfs is mounted.
    yield cpio.Entry(path="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1))
    yield cpio.file("init", INIT.read_bytes(), 0o755)
    yield cpio.file("bin/busybox", (kit_layer / "busybox").read_bytes(), 0o755)
    for command in COMMANDS:
        yield cpio.symlink(f"bin/{command}", "busybox")
    yield from cpio.tree(kit_layer / "modules", "modules")
    yield cpio.file("modules/load", "".join(f"{name}\n" for name in load).encode())
    yield from cpio.tree(code, "hintfleet")


def _point(link: Path, target: str) -> None:
    """Make `link` point to `target` in one step: readers find the old or the new target."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    with tempfile.TemporaryDirectory(dir=link.parent, prefix=BUILDING) as aside:
        new = Path(aside, link.name)
        new.symlink_to(target)
        new.replace(link)


def main() -> int:
    """Build the image, and print where it is; return the exit code."""
    parser = argparse.ArgumentParser(description="build the guest image")
    parser.add_argument("--print-path", action="store_true", help="print the image's directory")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="current",
        help="which image: `current` has Python and little else, `compiler` has g++ besides",
    )
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="NAME",
        help="install one more Debian package on the root disk",
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        require_tools()
        images = image_dir(dict(os.environ), os.geteuid() == 0)
        image = build(images, arguments.variant, arguments.package)
    except (BuildError, OSError) as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    if arguments.print_path:
        print(image)
    else:
        print(f"image: {image} ({time.monotonic() - started:.1f} s)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())

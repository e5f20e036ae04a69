"""The image's first layer: a Debian kernel, drivers, our module built for it, and a static shell.

All of them are copied from a throwaway tree that has the kernel's headers and a compiler.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common import SUITE, TREE, BuildError, build_once, digest, mmdebstrap, write_json

KMOD = TREE / "deploy/kmod"
KMOD_SOURCES = ("hintfleet.h", "hintfleet_kmod.c", "Kbuild", "Makefile")
KERNEL = "linux-image-cloud-amd64"
PACKAGES = (KERNEL, "linux-headers-cloud-amd64", "gcc", "make", "busybox-static")

DRIVERS = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_mem"),
    "virtiofs",  # the driver of the memory door's device; no file system is mounted
    "qemu_fw_cfg",
)
"""What every guest loads before it runs the agent; ext4 and serial are built into the kernel."""

# A script that runs outside the throwaway tree, which is $1. The tree's own make and gcc are used.
_BUILD = r"""
set -eu
release=$(basename "$1"/lib/modules/*)
chroot "$1" make --silent -C /tmp/kmod W=1 KDIR=/lib/modules/$release/build
chroot "$1" strip --strip-debug /tmp/kmod/hintfleet_kmod.ko
mkdir "$1/tmp/kit" "$1/tmp/kit/modules"
cp "$1/boot/vmlinuz-$release" "$1/tmp/kit/vmlinuz"
cp "$1/bin/busybox" "$1/tmp/kit/busybox"
cp "$1/tmp/kmod/hintfleet_kmod.ko" "$1/tmp/kit/modules/"
cp "$1/lib/modules/$release/modules.dep" "$1/lib/modules/$release/modules.builtin" "$1/tmp/kit/"
cp -r "$1/lib/modules/$release/kernel" "$1/tmp/kit/"
chroot "$1" dpkg-query -W -f '${Version}\n' "linux-image-$release" > "$1/tmp/kit/version"
echo $release > "$1/tmp/kit/release"
"""


def kit(layers: Path) -> Path:
    """Return the directory with vmlinuz, busybox, modules/ and kit.json; build it if it is not
    there.

    kit.json has `kernel` (release), `kernel_package` (Debian version) and `load`: the files in
    modules/ that every guest loads, in loading order (our module, for kmod only, is not in it).

    :raises BuildError: a step failed.
    """
    sources = [KMOD / name for name in KMOD_SOURCES]
    key = digest([SUITE, *PACKAGES, *DRIVERS, Path(__file__), *sources])
    return build_once(layers / f"kit-{key}", "kit.json", _build)


def _build(to: Path) -> None:
    kmod = to / "kmod"
    kmod.mkdir()
    for name in KMOD_SOURCES:
        shutil.copy(KMOD / name, kmod)
    hooks = [
        ("customize", f"copy-in {kmod} /tmp"),
        ("customize", _BUILD),
        ("customize", f"copy-out /tmp/kit {to}"),
    ]
    mmdebstrap(None, PACKAGES, hooks, "apt")
    _keep(to / "kit", to)
    for done in (kmod, to / "kit"):
        shutil.rmtree(done)


def _keep(made: Path, to: Path) -> None:
    """Move or copy what the image needs from `made` to `to`, and write kit.json."""
    load = module_files(
        DRIVERS, (made / "modules.dep").read_text(), (made / "modules.builtin").read_text()
    )
    (made / "modules").rename(to / "modules")
    for file in load:
        shutil.copy(made / file, to / "modules")
    for name in ("vmlinuz", "busybox"):
        (made / name).rename(to / name)
        (to / name).chmod(0o644)
    write_json(
        to / "kit.json",
        {
            "kernel": (made / "release").read_text().strip(),
            "kernel_package": (made / "version").read_text().strip(),
            "load": [Path(file).name for file in load],
        },
    )


def module_files(names: tuple[str, ...], dep: str, builtin: str) -> list[str]:
    """Return the files of the named modules and of all that they need, in loading order. Named
    modules that are built into the kernel are left out.

    :param dep: text of modules.dep: lines of `file: needed file ...`, where the needed files are in
        the reverse of their loading order.
    :param builtin: text of modules.builtin: the files of modules that are built into the kernel.
    :raises BuildError: the kernel has no such module.
    """
    needs = dict(line.split(":", 1) for line in dep.splitlines())
    by_name = {Path(file).name.partition(".")[0]: file for file in needs}
    present = {Path(file).name.partition(".")[0] for file in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in names:
        if name in present:
            continue
        if name not in by_name:
            raise BuildError(f"the kernel of {KERNEL} ({SUITE}) has no module {name}")
        file = by_name[name]
        order |= dict.fromkeys([*reversed(needs[file].split()), file])
    return list(order)

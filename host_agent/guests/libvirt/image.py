"""Finds the guest image that deploy/image/build.py made, and checks that it can be read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hintfleet.errors import Refused
from hintfleet.system.files import read_at_most

_MAX_MANIFEST_BYTES = 1 << 20
_CURRENT = "current"
# A variant's name becomes a part of a path, and may come from another machine.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class GuestImage:
    """A guest image that exists and can be read.

    :ivar directory: contains vmlinuz, initrd.img and root.img; its name is a hash of the inputs.
    :ivar kernel_release: release of the guest's kernel, as `uname -r` prints it.
    """

    directory: Path
    kernel_release: str

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def root_disk(self) -> Path:
        return self.directory / "root.img"


def default_image_dir(environ: Mapping[str, str]) -> Path:
    """Return where the builder puts images; deploy/image/build.py has the same rule."""
    if chosen := environ.get("HINTFLEET_IMAGE_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/hintfleet/images")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/"), ".cache")
    return Path(cache, "hintfleet/images")


def find_image(images: Path | None = None, variant: str = "") -> GuestImage:
    """Return the image that the builder's link of a variant points to.

    :param images: the directory of all images; None for the default one.
    :param variant: one of those that deploy/image/build.py knows; empty for `current`.
    :raises Refused: there is none, a part of it cannot be read, or image.json is damaged.
    """
    variant = variant or _CURRENT
    if not _NAME.fullmatch(variant):
        raise Refused(f"{variant!r} is not the name of a guest image")
    link = (images or default_image_dir(os.environ)) / variant
    manifest = link / "image.json"
    build = f"make image{'' if variant == _CURRENT else f' VARIANT={variant}'}"
    hint = f"{build} (or set HINTFLEET_IMAGE_DIR to where it was built)"
    try:
        directory = link.resolve(strict=True)
        release = json.loads(read_at_most(manifest, _MAX_MANIFEST_BYTES))["kernel"]
        image = GuestImage(directory=directory, kernel_release=release)
        for path in (image.kernel, image.initrd, image.root_disk):
            with path.open("rb") as file:
                file.read(1)
    except FileNotFoundError as error:
        raise Refused(f"no guest image: {error.filename} is missing", hint=hint) from error
    except OSError as error:
        raise Refused(
            f"the guest image cannot be read: {error}", hint="make it readable for this user"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"the guest image's {manifest} is damaged", hint=hint) from error
    return image

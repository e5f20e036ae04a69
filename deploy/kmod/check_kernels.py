#!/usr/bin/env python3
"""Build the kernel module, with warnings as errors, for two Debian kernels of each of FLAVOURS: the
newest one in SUITE and the newest one in the backports of SUITE.

The headers of these kernels are installed in a throwaway tree (as for the guest image,
deploy/image). Prints a line for each kernel, and the log of a build that fails. Exits with 1 if a
build fails, if nothing was built, or if the tree cannot be made.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "image"))

from common import SUITE, BuildError, mmdebstrap, require_tools
from kit import KMOD, KMOD_SOURCES

FLAVOURS = ("cloud-amd64", "amd64", "rt-amd64")

# $1 is the tree. The backports are fetched from the same servers as the release.
_BACKPORTS = f"""
set -eu
sed -n 's/ {SUITE} / {SUITE}-backports /p' "$1/etc/apt/sources.list" \
    > "$1/etc/apt/sources.list.d/backports.list"
chroot "$1" apt-get -q update
chroot "$1" apt-get -q -y --no-install-recommends install -t {SUITE}-backports \
    {" ".join(f"linux-headers-{flavour}" for flavour in FLAVOURS)}
"""

_BUILD = r"""
set -u
for build in "$1"/lib/modules/*/build; do
    release=$(basename "$(dirname "$build")")
    chroot "$1" rm -rf /tmp/try
    chroot "$1" cp -r /tmp/kmod /tmp/try
    if chroot "$1" make --silent -C /tmp/try W=1 KCFLAGS=-Werror \
        KDIR="/lib/modules/$release/build" > "$1/tmp/log" 2>&1; then
        echo "builds   $release"
    else
        echo "FAILS    $release"
        sed 's/^/    /' "$1/tmp/log"
    fi
done > "$1/tmp/results"
"""


def main() -> int:
    """Build for all kernels; return the exit code, 0 if all builds succeed."""
    with tempfile.TemporaryDirectory() as folder:
        kmod = Path(folder) / "kmod"
        kmod.mkdir()
        for name in KMOD_SOURCES:
            shutil.copy(KMOD / name, kmod)
        headers = [f"linux-headers-{flavour}" for flavour in FLAVOURS]
        hooks = [
            ("customize", _BACKPORTS),
            ("customize", f"copy-in {kmod} /tmp"),
            ("customize", _BUILD),
            ("customize", f"copy-out /tmp/results {folder}"),
        ]
        try:
            require_tools()
            mmdebstrap(None, (*headers, "gcc", "make"), hooks, "apt")
        except BuildError as error:
            print(f"check_kernels: {error}", file=sys.stderr)
            return 1
        results = (Path(folder) / "results").read_text()
    print(results, end="")
    return int("FAILS" in results or "builds" not in results)


if __name__ == "__main__":
    sys.exit(main())

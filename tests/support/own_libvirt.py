"""A libvirtd of a test's own, which may be restarted without disturbing anybody else's domains.
Needs root."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from host_agent.guests.libvirt.api import modules

_START_S = 60.0
_STOP_S = 60.0

# libvirtd's folders are fixed when it is built. In a mount namespace of its own, it has the test's
# folders there instead.
_RUN = """
set -eu
for name in run/libvirt var/lib/libvirt var/cache/libvirt etc/libvirt; do
    mkdir -p "/$name"
    mount --bind "$1/$name" "/$name"
done
exec libvirtd --config "$1/libvirtd.conf" --pid-file "$1/libvirtd.pid"
"""
_LIBVIRTD = """\
unix_sock_dir = "{folder}/sock"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
auth_unix_rw = "none"
"""
# QEMU writes its log itself: virtlogd would be one more daemon that needs folders of the test.
_QEMU = 'stdio_handler = "file"\n'


class OwnLibvirt:
    """A libvirtd that this process has started.

    :ivar uri: for libvirt.open, from any process of this machine that may open its socket: root,
        and members of the group libvirt.
    """

    def __init__(self, folder: Path) -> None:
        """Do not call this: `own_libvirt` makes one."""
        self.uri = f"qemu:///system?socket={folder}/sock/libvirt-sock"
        self._folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None

    def open(self) -> Any:
        """Return a new connection."""
        libvirt, _ = modules()
        return libvirt.open(self.uri)

    def find(self, uuid_text: str) -> Any:
        """Return a domain, by a new connection: an older one may be to a libvirtd that has ended.

        :raises libvirt.libvirtError: libvirtd does not answer, or has no such domain.
        """
        return self.open().lookupByUUIDString(uuid_text)

    def start(self) -> None:
        """Start libvirtd, and wait until it answers. It finds the domains that an earlier one left.

        :raises RuntimeError: it ended, or does not answer within _START_S.
        """
        self._daemon = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _RUN, "sh", str(self._folder)],
            stdout=subprocess.DEVNULL,
            stderr=(self._folder / "libvirtd.log").open("ab"),
        )
        libvirt, _ = modules()
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                self.open().getCapabilities()
                return
            except libvirt.libvirtError as error:
                if time.monotonic() > deadline_s or self._daemon.poll() is not None:
                    said = (self._folder / "libvirtd.log").read_text(errors="replace")
                    raise RuntimeError(f"libvirtd does not answer: {error}\n{said}") from error
                time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End libvirtd; its domains run on."""
        if self._daemon is not None:
            self._daemon.send_signal(number)
            try:
                self._daemon.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()

    def end(self) -> None:
        """End all domains, and libvirtd."""
        libvirt, _ = modules()
        try:
            if self._daemon is not None and self._daemon.poll() is not None:
                self.start()  # a test has killed libvirtd
            for domain in self.open().listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
        finally:
            self.stop()


@contextlib.contextmanager
def own_libvirt() -> Iterator[OwnLibvirt]:
    """Run a libvirtd; end it, with all its domains, after the block."""
    folder = Path(tempfile.mkdtemp(prefix="hf-libvirt-"))
    # QEMU's user has to reach the sockets of QEMU's monitor and of the QEMU guest agent in here.
    folder.chmod(0o755)
    for name in ("sock", "run/libvirt", "var/lib/libvirt", "var/cache/libvirt", "etc/libvirt"):
        (folder / name).mkdir(parents=True)
    (folder / "libvirtd.conf").write_text(_LIBVIRTD.format(folder=folder))
    (folder / "etc/libvirt/qemu.conf").write_text(_QEMU)
    made = OwnLibvirt(folder)
    try:
        made.start()
        yield made
    finally:
        try:
            made.end()
        finally:
            shutil.rmtree(folder)

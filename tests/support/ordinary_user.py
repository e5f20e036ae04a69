"""The host agent as an ordinary user in the group libvirt, without any capability.

    python -m tests.support.ordinary_user [host agent's arguments]

Must be started by root. The process gives up all rights of root, and then runs the host agent. It
imports all modules of the host agent before it gives up these rights, because the user may not be
able to read this source tree.
"""

from __future__ import annotations

import grp
import importlib
import os
import pkgutil
import pwd
import sys
from pathlib import Path

import host_agent
from host_agent.__main__ import main

USER = "nobody"
GROUP = "libvirt"


def _import_all() -> None:
    for module in pkgutil.walk_packages(host_agent.__path__, "host_agent."):
        if not module.name.endswith(("__main__", "libpunch")):  # libpunch.so is no Python module
            importlib.import_module(module.name)
    for name in ("libvirt", "libvirt_qemu", "encodings.idna"):
        importlib.import_module(name)


def _become(user: pwd.struct_passwd) -> None:
    os.setgroups([grp.getgrnam(GROUP).gr_gid])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ["HOME"] = "/nonexistent"
    # The user may not be able to enter the folder in which root started this.
    os.chdir("/")
    status = Path("/proc/self/status").read_text()
    assert "CapEff:\t0000000000000000" in status, status


if __name__ == "__main__":
    _import_all()
    _become(pwd.getpwnam(USER))
    sys.exit(main())

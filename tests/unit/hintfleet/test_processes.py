"""Processes that /proc lists, but whose files this user may not read, are left out."""

import os
import subprocess
import sys

import pytest

_OTHERS_AS_NOBODY = """
import os
from hintfleet.system.processes import other_processes
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert 1 not in [process.pid for process in other_processes()]
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting /proc needs root")
def test_processes_that_are_listed_but_hidden_are_left_out() -> None:
    """With hidepid=1 (proc(5)) only root and its group can read another user's processes."""
    within = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=1 proc /proc && "$@"')
    if subprocess.run([*within, "sh", "true"], check=False).returncode:
        pytest.skip("this machine mounts no /proc with hidepid=1")
    done = subprocess.run(
        [*within, "sh", sys.executable, "-c", _OTHERS_AS_NOBODY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

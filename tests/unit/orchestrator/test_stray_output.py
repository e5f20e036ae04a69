"""`stray_output_to` redirects stdout and stderr of this process and its children to the end of a
file, except what is written to the stream that it yields."""

import subprocess
import sys
from pathlib import Path

import pytest

from hintfleet.errors import Refused
from orchestrator.cluster.stray_output import stray_output_to

_PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from orchestrator.cluster.stray_output import stray_output_to

print("before", end=" ")  # not flushed yet
with stray_output_to(Path(sys.argv[1])) as terminal:
    if "noise" in sys.argv:
        print("print")
        os.write(1, b"descriptor 1\\n")
        os.write(2, b"descriptor 2\\n")
        subprocess.run(["sh", "-c", "echo child >&2"])
        print("sys.stderr", file=sys.stderr)
    print("ours", file=terminal)
print("after")
print("and after", file=sys.stderr)
"""


def said(log: Path, *arguments: str) -> tuple[str, str]:
    command = [sys.executable, "-c", _PROGRAM, str(log), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_noise_goes_into_the_file(tmp_path: Path) -> None:
    log = tmp_path / "logs/run.log"
    for times in (1, 2):
        assert said(log, "noise") == ("before after\n", "ours\nand after\n")
        noise = ["child", "descriptor 1", "descriptor 2", "print", "sys.stderr"]
        assert sorted(log.read_text().splitlines()) == sorted(noise * times), "appended"


_FAILS = """
import sys
from pathlib import Path
from orchestrator.cluster.stray_output import stray_output_to

try:
    with stray_output_to(Path(sys.argv[1])):
        sys.stdout = open(1, "w", closefd=False)  # buffered, whatever the environment says
        print("noise")
        raise KeyError("what went wrong")
except KeyError as error:
    print(error, file=sys.stderr)
print("data")
"""


def test_a_full_disk_hides_no_error_and_no_data(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.symlink_to("/dev/full")
    command = [sys.executable, "-c", _FAILS, str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("data\n", "'what went wrong'\n")


def test_without_noise_there_is_no_file(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert said(log) == ("before after\n", "ours\nand after\n")
    assert not log.exists()


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder is to be")
    with pytest.raises(Refused, match="logs"), stray_output_to(tmp_path / "logs/run.log"):
        pass

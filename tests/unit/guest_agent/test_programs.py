"""Programs of a guest run only if they are allowed, are killed when they take too long or their
agent ends, and leave no process running."""

import os
import threading
import time
from pathlib import Path

import pytest

from guest_agent.workload.programs import Programs
from hintfleet.errors import Refused
from hintfleet.v1 import hinting_pb2 as pb
from host_agent.session.validation import check_done

HANG_S = 300.0


def run(*arguments: str, timeout_s: float = HANG_S) -> None:
    Programs(("sh", "sleep", "/nowhere/program")).run(arguments, timeout_s, threading.Event())


def test_a_program_that_ends_well(tmp_path: Path) -> None:
    run("sh", "-c", f"cat > '{tmp_path}/got'; echo done >> '{tmp_path}/got'")
    assert (tmp_path / "got").read_text() == "done\n", "its input is empty"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("sh", "-c", "echo out; echo err >&2; exit 3"),
            "exited with 3; its last output:\nout\nerr",
        ),
        (("sh", "-c", "exit 3"), "sh -c 'exit 3': exited with 3; it wrote nothing"),
        (("sh", "-c", "kill -9 $$"), "was killed by signal 9"),
        (("bash", "-c", "exit 0"), "the agent's configuration does not allow it"),
        (("/bin/sh", "-c", "exit 0"), "the agent's configuration does not allow it"),
        ((), "does not allow it"),
        (("/nowhere/program",), "cannot be started: "),
        (("sh", "a\0b"), "cannot be started: "),
    ],
)
def test_what_goes_wrong_is_said(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused) as caught:
        run(*arguments)
    assert said in caught.value.message


def test_much_output_is_read_and_its_end_is_told() -> None:
    with pytest.raises(Refused) as caught:
        run("sh", "-c", "yes \N{SNOWMAN} | head -c 1000000; echo the end; exit 1")
    assert caught.value.message.endswith("\N{SNOWMAN}\nthe end")


def test_a_host_accepts_the_longest_error() -> None:
    with pytest.raises(Refused) as caught:
        run("sh", "-c", "yes | head -c 1000000; exit 1", "x" * 1000)
    check_done(pb.Done(error=caught.value.message), 1 << 30)


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_a_program_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"sleep {HANG_S} & echo $! > '{tmp_path}/child'; echo waiting; wait"
    with pytest.raises(Refused, match=r"did not end within 0\.5 s; its last output:\nwaiting"):
        run("sh", "-c", script, timeout_s=0.5)
    child = int((tmp_path / "child").read_text())
    deadline_s = time.monotonic() + HANG_S
    while not ended(child):
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("job_control", ["", "set -m; "])
def test_what_a_program_left_running_is_killed_and_not_waited_for(
    tmp_path: Path, job_control: str
) -> None:
    """With job control, a shell makes a process group for what it starts."""
    run("sh", "-c", f"{job_control}sleep {HANG_S} & echo $! > '{tmp_path}/child'")
    child = int((tmp_path / "child").read_text())
    deadline_s = time.monotonic() + HANG_S
    while not ended(child):
        assert time.monotonic() < deadline_s


def test_a_program_ends_when_its_agent_ends() -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Refused):
        Programs(("sleep",)).run(("sleep", str(HANG_S)), 2 * HANG_S, stop)

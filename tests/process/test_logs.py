"""What host agents, guests' agents and experiments log, and in which formats. A bug ends only the
stream, the guest or the program that it concerns, and is logged."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.api import guest_service
from host_agent.memory.guest_memory import GuestMemory
from tests.support.agents import (
    HANG_S,
    TRIAL,
    host_in_process,
    running_host_agent,
    wait_until,
)
from tests.support.speaker import Speaker


def a_guest_that_is_killed(log: Path, *arguments: str) -> tuple[int, int]:
    """Run a host agent that logs to `log`; make, use and kill one guest. Return the process ids of
    the host agent and the guest."""
    with log.open("wb") as stderr, running_host_agent(*arguments, stderr=stderr) as host:
        host.watch()
        pid = host.create("g", max_memory_bytes=256 * MIB).pid
        host.resize(256 * MIB, "g")
        host.allocate(8 * MIB)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            host.allocate(8 * MIB)
        wait_until(lambda: "guest lost" in log.read_text(), "the loss to be logged")
        return host.process.pid, pid


def test_the_life_of_a_guest_as_json(tmp_path: Path) -> None:
    log = tmp_path / "log"
    _, pid = a_guest_that_is_killed(log, "--log-format", "json", "--name", "rack1")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(line["host"] == "rack1" for line in lines)
    story = {line["message"]: line for line in lines}
    assert story["serving"]["control"].startswith("unix:")
    assert story["guest made"] | {"guest": "g", "pid": pid, "trial": TRIAL} == story["guest made"]
    assert story["session welcomed"]["epoch"] > 0
    assert story["workload attached"]["guest"] == "g"
    resized = story["guest resized"]
    assert (resized["before_bytes"], resized["now_bytes"]) == (128 * MIB, 256 * MIB)
    failed = story["command failed"]
    assert (failed["command"], failed["level"]) == ("RunStep", "warning")
    lost = story["guest lost"]
    assert lost["level"] == "warning"
    assert lost["epoch"] == story["session welcomed"]["epoch"]
    assert "ended with" in lost["reason"] or "signal" in lost["reason"]
    order = [line["message"] for line in lines]
    assert order.index("guest made") < order.index("session welcomed") < order.index("guest lost")


def test_text_has_time_level_and_fields(tmp_path: Path) -> None:
    log = tmp_path / "log"
    a_guest_that_is_killed(log, "--name", "rack 1")
    made = next(line for line in log.read_text().splitlines() if "guest made" in line)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO hintfleet\.host\.guest: guest made "
        rf'host="rack 1" guest=g trial={TRIAL} pid=\d+',
        made,
    ), made


def test_a_level_leaves_out_what_is_below(tmp_path: Path) -> None:
    log = tmp_path / "log"
    a_guest_that_is_killed(log, "--log-level", "warning")
    levels = {line.split()[1] for line in log.read_text().splitlines()}
    assert levels == {"WARNING"}


def test_journald_gets_priorities_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()
    status = log.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    a_guest_that_is_killed(log)
    lines = log.read_text().splitlines()
    assert any(line.startswith("<6>hintfleet.host.guest: guest made host=") for line in lines)
    assert any(line.startswith("<4>hintfleet.host.guest: guest lost host=") for line in lines)


def test_a_guests_agent_logs_its_sessions(tmp_path: Path) -> None:
    """It logs to stderr. If the guest is lost, the host agent reports the end of that output."""
    with (tmp_path / "log").open("wb") as stderr, running_host_agent(stderr=stderr) as host:
        host.watch()
        guest = host.create("g")
        line = f"guest.session: session welcomed guest={guest.uuid} epoch={guest.epoch}\n"
        wait_until(lambda: line in Path(f"/proc/{guest.pid}/fd/2").read_text(), line)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = vars(record)["hintfleet_fields"]
    return found


def logged(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [fields_of(record) for record in caplog.records if record.getMessage() == message]


def test_superseded_sessions_and_skipped_batches_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hintfleet")
    with host_in_process() as host:
        host.watch()
        uuid = host.create(method=host_pb2.NONE).uuid
        first, second = Speaker(host.guest_address), Speaker(host.guest_address)
        first.hello(uuid, host.token("g"))
        epoch = first.next().welcome.epoch
        second.hello(uuid, host.token("g"))
        newer = second.next().welcome.epoch
        wait_until(lambda: bool(logged(caplog, "session ended")), "the first session to end")
        for seq in range(1, 10):
            second.batch(newer, seq, RangeSet([((1 << 30) + 512 * seq, 512)]))
            second.next()
        second.batch(newer, 1, RangeSet([(0, 512)]))
        assert second.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT
        first.close()
        second.close()
    assert logged(caplog, "session superseded") == [{"guest": "g", "epoch": epoch}]
    ended = logged(caplog, "session ended")
    assert [line["epoch"] for line in ended] == [epoch, newer]
    (skipped,) = logged(caplog, "batch skipped")
    assert skipped == {"guest": "g", "epoch": newer, "seq": 1, "reason": "OUTSIDE_RAM"}, "only once"
    (broken,) = logged(caplog, "guest broke the protocol")
    assert broken["reason"] == ended[1]["reason"]


def test_work_that_fails_loses_only_its_own_guest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the guest were not lost, its batch would never be answered."""

    async def fail(*_: object) -> None:
        raise KeyError("missing")

    with host_in_process() as host:
        host.watch()
        host.create("other", method=host_pb2.NONE)
        uuid = host.create("g", method=host_pb2.NONE).uuid
        monkeypatch.setattr(GuestMemory, "reclaim", fail)
        one = Speaker(host.guest_address)
        one.hello(uuid, host.token("g"))
        one.batch(one.next().welcome.epoch, 1, RangeSet([(0, 512)]))
        assert "the host agent failed while working on it: KeyError" in one.refusal()[1]
        one.close()
        host.allocate(2 * MIB, "other")
    (failed,) = (r for r in caplog.records if r.getMessage() == "work on a guest failed")
    assert fields_of(failed)["guest"] == "g"
    assert failed.exc_info
    assert isinstance(failed.exc_info[1], KeyError)


def test_a_reader_that_fails_ends_its_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("missing")

    with host_in_process() as host:
        host.watch()
        uuid = host.create("g", method=host_pb2.NONE).uuid
        monkeypatch.setattr(guest_service, "check_telemetry", fail)
        one = Speaker(host.guest_address)
        one.hello(uuid, host.token("g"))
        one.next()
        one.outbox.put(pb.GuestMessage(telemetry=pb.Telemetry()))
        assert one.refusal() == (grpc.StatusCode.UNAVAILABLE, "the host agent failed: KeyError")
        one.close()
    assert "reading a stream failed" in [record.getMessage() for record in caplog.records]


BUG = """
from host_agent import auditor, __main__ as program
from host_agent.pressure.loop import Pressure
def fail(*_): raise KeyError("missing")
{place} = fail
program.main()
"""


@pytest.mark.parametrize("place", ["Pressure.act", "auditor.next_wake_s"])
def test_a_loop_that_fails_ends_the_agent(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the host agent went on, it would look healthy, but make no audits or give no
    allowances."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run(
        [
            *(sys.executable, "-c", BUG.format(place=place)),
            *("--listen", f"unix:{tmp_path}/host.sock"),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "a bug in hintfleet: KeyError: 'missing'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_experiment_logs_its_trials_on_stderr(tmp_path: Path) -> None:
    """Log lines go to stderr, not to the file for Ray's output."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: s\ndriver: embedded\nhosts: {count: 1, memory: 512MiB}\n"
        "guests: {per_host: 1, memory: 64MiB}\n"
        "workload: {phases: [{allocate: 16MiB, for: 0.3s}, {free: 100%, for: 0.3s}]}\n"
        "arms: [{name: none, method: none}]\nrepetitions: 1\nseed: 1\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "orchestrator", "--log-level", "info", "--log-format", "json"),
            *("run", str(spec), "--data-dir", str(tmp_path / "data"), "-o", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    messages = [line["message"] for line in lines]
    assert messages == ["run begun", "ray connected", "host reached", "trial begun", "trial ended"]
    assert lines[-1]["status"] == "done"
    assert lines[-1]["trial"].startswith(lines[0]["run"])
    json.loads(done.stdout)

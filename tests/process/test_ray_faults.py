"""If no Ray cluster answers, or a process of a run's private Ray dies, the run ends with one error.
Ray's own output goes to a file, not to stderr."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import grpc
import pytest

from tests.support.agents import wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, made_lab, wait_for_line
from tests.support.ray_cluster import TINY

SPEC = TINY.replace("count: 3", "count: 4")
TOLD_WITHIN_S = 60
"""How soon the error that no cluster answers must come; Ray itself would try for minutes."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with made_lab(tmp_path) as made:
        yield made


@contextmanager
def nobody() -> Iterator[int]:
    with socket.socket() as bound:  # it never listens, so connections are refused
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def silence() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def web_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@contextmanager
def other_grpc_server() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0)


@pytest.mark.parametrize("what", [nobody, silence, web_server, other_grpc_server])
def test_an_address_where_no_ray_cluster_answers(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[[], AbstractContextManager[int]],
) -> None:
    # Without this variable, Ray replaces 127.0.0.1 by an address that other machines can reach.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with what() as port:
        monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{port}")
        with lab.started("run", lab.spec(SPEC)) as process:
            wait_for_line(process, "run ")
            out, err = process.communicate(timeout=TOLD_WITHIN_S)
    assert (process.returncode, out) == (1, "")
    error, hint = err.splitlines()
    assert error.startswith(f"error: no Ray cluster answers at RAY_ADDRESS={address}: ")
    assert hint.startswith("  try: ")
    lab.check_nothing_is_left()


@pytest.mark.parametrize(
    ("program", "said"), [("raylet/raylet ", "raylet"), ("gcs/gcs_server ", "GCS")]
)
def test_a_process_of_ray_that_dies_ends_the_run(lab: Lab, program: str, said: str) -> None:
    with lab.started("run", lab.spec(SPEC.replace("6s", "60s"))) as process:
        wait_for_line(process, "trial 1 ")
        wait_until(lambda: len(lab.agents("guest_agent")) == 4, "four guests")
        (pid,) = lab.find(program)
        os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    *before, error, hint = err.splitlines()
    assert not [line for line in before if not line.startswith(("lost: ", "trial "))]
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("  try: ")
    assert "hintfleet run --resume" in hint
    logs = list(map(str, lab.folder.glob("hintfleet/logs/*.log")))
    assert all(log in hint for log in logs), "if it said anything"
    lab.check_nothing_is_left()


def test_a_closed_stderr_is_no_reason_to_fail(lab: Lab) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *lab.command("run", lab.spec(SPEC))],
        env=lab.environment | {"RAY_ADDRESS": "127.0.0.1:1"},
        stdout=subprocess.PIPE,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""

"""Real commands work with folders and files of any name that a file system allows. One exception: a
run refuses a data folder whose name is not UTF-8, because Ray cannot use it."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hintfleet.net.addresses import grpc_target
from tests.process.test_run_quickstart import SPEC, arms, spec
from tests.support.agents import HANG_S, running_host_agent, wait_until
from tests.support.lab import made_lab, result
from tests.support.stored import store_run

# Each name has what several programs may take for something else.
NAMES = {
    "glob, hive and markup": b'host=a [x] *? it\'s "a"; -- [bold]x{}%s$y',
    "uri, line feed and scripts": "file:a#b%41?mode=ro\nжя 中 😀".encode(),
    "no UTF-8": b"a\xff",
}
COMMANDS = {"hintfleet": "orchestrator", "hintfleet-host": "host_agent"}


@pytest.fixture(params=list(NAMES.values()), ids=list(NAMES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Make a folder with a name of NAMES; return a link to it that has the same name."""
    name = os.fsdecode(request.param)
    (tmp_path / "real" / name).mkdir(parents=True)
    (tmp_path / name).symlink_to(tmp_path / "real" / name)
    return tmp_path / name


def ran(command: str, *arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", COMMANDS[command], *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=HANG_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "a bug" not in done.stderr
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_store(folder: Path) -> None:
    data_dir = ("--data-dir", folder)
    store_run(folder)
    assert ran("hintfleet", "show", *data_dir).startswith("quickstart: ")
    rows = json.loads(ran("hintfleet", "savings", "--by", "host", *data_dir, "-o", "json"))
    assert {row["key"] for row in rows} == {"host1", "host2"}
    assert ran("hintfleet", "compare", "run1", "run1", *data_dir, code=2).startswith("error: both")
    rows = ran("hintfleet", "export", *data_dir)
    exported = folder / f"{folder.name}.csv"
    ran("hintfleet", "export", *data_dir, "--to", exported)
    assert exported.read_text() == rows
    assert rows.count("run1,quickstart,") == 6 * 420
    for option, name in (("--output", "page.html"), ("--plot", "plot.svg")):
        pytest.importorskip("altair")
        path = folder / f"{folder.name}.{name}"
        assert ran("hintfleet", "report", *data_dir, option, path) == f"{path}\n"
        assert path.read_bytes()


def test_a_spec(folder: Path) -> None:
    path = folder / f"{folder.name}.yaml"
    path.write_text("name: [1]\n")
    said = ran("hintfleet", "run", path, "--data-dir", folder, code=2)
    assert f"{path}:1:1: name: " in said


def test_certificates(folder: Path) -> None:
    pki = folder / folder.name
    assert ran("hintfleet", "pki", "init", "--folder", pki) == f"{pki}\n"
    host, operator = (
        ran("hintfleet", "pki", "issue", role, "h1", *at, "--folder", pki).removesuffix("\n")
        for role, *at in (("host", "--at", "127.0.0.1"), ("operator",))
    )
    shown = json.loads(ran("hintfleet", "pki", "show", pki, "-o", "json"))
    assert {one["path"] for one in shown} >= {f"{host}/cert.pem", f"{operator}/cert.pem"}
    for output in ("table", "yaml"):
        assert "operator" in ran("hintfleet", "pki", "show", pki, "-o", output)
    with serving(folder, "--listen", "127.0.0.1:0", "--tls", host) as address:
        asked = ("savings", "--server", address, "--tls", operator, "-o", "json")
        assert json.loads(ran("hintfleet", *asked)) == []


@contextmanager
def serving(data_dir: Path, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "orchestrator", "serve", *arguments, "--data-dir"]
    with subprocess.Popen(
        [*command, data_dir], stderr=subprocess.PIPE, encoding="utf-8", errors="surrogateescape"
    ) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            assert said.startswith("serving on "), said
            yield said.split()[-1]
        finally:
            server.send_signal(signal.SIGTERM)


def test_sockets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_run(folder)
    monkeypatch.chdir(folder)  # so that the path of the socket is short
    address = f"unix:{folder.name}"
    command = [
        sys.executable,
        "-m",
        "orchestrator",
        "serve",
        "--data-dir",
        ".",
        "--listen",
        address,
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: Path(folder.name).is_socket(), "the socket with its name")
            rows = json.loads(ran("hintfleet", "savings", "--server", address, "-o", "json"))
            assert {row["arm"] for row in rows} == {"none", "bitmap"}
        finally:
            server.terminate()


def test_a_state_folder_and_the_host_agents_socket(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    place = ("--listen", f"unix:{folder.name}.sock", "--state", f"{folder.name}.state")
    guest_uuid = str(uuid.uuid4())
    with running_host_agent(*place, "--orphan-after", "20") as host:
        assert host.control == place[1]
        host.watch()
        host.create(uuid=guest_uuid)
        host.process.kill()
        host.process.wait()
    with running_host_agent(*place, "--orphan-after", "20") as host:
        assert host.guests()["g"].uuid == guest_uuid, "found again"
    assert not Path(f"{folder.name}.sock").exists(), "removed under its name"


def test_a_real_run_where_all_folders_have_such_names(tmp_path: Path) -> None:
    name = os.fsdecode(b"".join(found for found in NAMES.values() if b"\xff" not in found))
    work = tmp_path / name
    work.mkdir()
    with made_lab(work) as lab:
        temporary = lab.folder / "tmp"
        temporary.mkdir()
        (work / f"{name}.yaml").write_text(spec(count="1", repetitions="1"))
        environment = lab.environment | {"TMPDIR": str(temporary)}
        done = subprocess.run(
            lab.command("run", f"{name}.yaml", "-o", "json"),
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert arms(result(done, 3)).keys() == {"none", "bitmap"}, "one repetition has no interval"
        assert sorted(path.name for path in temporary.iterdir()) == []


def test_ray_is_not_started_with_a_name_that_it_cannot_have(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(NAMES["no UTF-8"])
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    assert "not UTF-8" in ran("hintfleet", "run", path, "--data-dir", folder, code=1)
    assert not folder.exists()


def test_what_grpc_is_told_of_a_socket() -> None:
    assert grpc_target("unix:/a b#%41?c") == "unix:/a%20b%23%2541%3Fc"
    assert grpc_target("unix-abstract:a#b") == "unix-abstract:a%23b"
    assert grpc_target("127.0.0.1:1") == "127.0.0.1:1"

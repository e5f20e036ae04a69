"""The command line without real runs: bad input is reported on stderr at once, with the right exit
code. Also lists, help and interrupts."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import run_command
from orchestrator.commands.run import Interrupts


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "nowhere.yaml"], 2, "no file 'nowhere.yaml'"),
        (["run", "quickstrat"], 2, "did you mean 'quickstart'"),
        (["run", "quickstart", "--driver", "model"], 2, "'model'"),
        (["run", "quickstart", "--host", "10.1.2.3:4"], 2, "loopback"),
        (["run", "quickstart", "-o", "xml"], 2, "'xml'"),
        (["run"], 2, "either a SPEC or --resume"),
        (["run", "quickstart", "--resume", "latest"], 2, "either a SPEC or --resume"),
        (["run", "--resume", "latest", "--driver", "libvirt"], 2, "leave out --driver"),
        (["run", "--resume", "nothing"], 2, "no run 'nothing'"),
        (["run", "quickstart", "--retries", "-1"], 2, "--retries"),
        (["fly"], 2, "No such command"),
        (["show", "nothing"], 2, "no run 'nothing'"),
        (["savings", "--since", "1"], 2, "no unit"),
        (["savings", "--run", "nothing"], 2, "no run 'nothing'"),
        (["savings", "--by", "planet"], 2, "'planet'"),
        (["savings", "--server", "example.org:1"], 2, "loopback"),
        (["savings", "--server", "unix:/nowhere/socket"], 1, "fleet service at unix:/nowhere"),
        (["compare", "latest"], 2, "Missing argument"),
        (["compare", "nothing", "latest"], 2, "no run 'nothing'"),
        (["compare", "a", "b", "--fail-on", "saved"], 2, "is not a bound"),
        (["export", "nothing"], 2, "no run 'nothing'"),
        (["export", "-o", "json"], 2, "'json'"),
        (["serve", "--listen", "0.0.0.0:1"], 2, "loopback"),
        (["report", "nothing"], 2, "no run 'nothing'"),
        (["report", "--plot", "plot.jpeg"], 2, "must end in .png or .svg"),
        (["report", "-o", "a.html", "--plot", "a.png"], 2, "give either --output or --plot"),
        (["experiments", "nothing"], 2, "it has churn, density, footprint, frontier, interf"),
    ],
)
def test_bad_input(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert run_command(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "RAY_ADDRESS=auto"),
        *((wrong, "HOST:PORT") for wrong in ("head", ":6379", "http://head:6379", " ", "head:x")),
    ],
)
def test_a_malformed_address_of_ray(
    address: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert run_command(["run", "quickstart"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: RAY_ADDRESS=")
    assert said in hint
    assert "unset RAY_ADDRESS" in hint


def test_more_memory_than_the_machine_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.yaml"
    large = "hosts: {count: 500, memory: 1TiB}\nguests: {per_host: 1000, memory: 256GiB}\n"
    path.write_text(
        "name: large\ndriver: embedded\n" + large + "workload: {phases: [{allocate: 192GiB}]}\n"
        "arms: [{name: none, method: none}]\n"
    )
    assert run_command(["run", str(path), "--data-dir", str(tmp_path)]) == 2
    assert "large.yaml:4:26: guests.memory" in (said := capsys.readouterr().err)
    assert "more memory than is available" in said
    assert not (tmp_path / "samples").exists()


def test_experiments_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["experiments", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == [
        *("churn", "density", "footprint", "frontier", "interference", "methods"),
        *("quickstart", "quickstart-vm", "staggered", "sweep", "switchback", "workday"),
    ]
    assert run_command(["experiments", "quickstart"]) == 0
    assert capsys.readouterr().out.startswith("#")


def test_no_runs_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runs", "-o", "json", "--data-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run_command(["savings", "--data-dir", str(tmp_path)]) == 0


def test_what_could_not_be_checked_for_leaks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    uri = f"qemu+unix:///session?socket={tmp_path}/nothing"
    command = ["doctor", "--leaks", "--libvirt-uri", uri, "--data-dir", str(tmp_path)]
    assert run_command(command) == 1
    out, err = capsys.readouterr()
    assert "nothing is left" not in out
    assert "not checked: domains: " in err


def test_no_arguments_show_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 0
    assert "hintfleet run quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["run", "serve", "savings", "doctor", "report", "compare", "export"]
)
def test_help_has_no_need_of_the_heavy_libraries(command: str) -> None:
    program = (
        "import sys\nfrom orchestrator.cli import run_command\n"
        f"code = run_command([{command!r}, '--help'])\n"
        "heavy = {'ray', 'duckdb', 'numpy', 'scipy', 'pydantic', 'grpc', 'altair'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: hintfleet" in done.stdout


def test_an_interrupt_whose_exception_was_lost_still_ends_the_run() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupts = Interrupts()
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):  # lost, as in a destructor
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

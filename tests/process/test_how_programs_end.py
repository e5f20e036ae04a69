"""How programs end when they get wrong input, cannot write their output, or have a bug: with an
exit code and a message, and never with a traceback on stderr. There is no message if stderr cannot
be written, or if only the reader of stdout has ended."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.spec.file import load
from tests.support.agents import HANG_S
from tests.support.stored import store_run

PROGRAMS = {"hintfleet": "orchestrator", "hintfleet-host": "host_agent"}
PROGRAMS["hintfleet-guest"] = "guest_agent"
LONG = f"unix:/tmp/{'x' * 115}"
ANYWHERE = ("--listen", "unix:sock")


def ran(
    *words: str, redirect: str = "", within: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    command = [*within, sys.executable, "-m", PROGRAMS[words[0]], *words[1:]]
    if redirect:
        command = ["bash", "-c", f'"$@" {redirect}', "bash", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    for sign in ("Traceback", "Exception ignored", "a bug in", "E0000"):
        assert sign not in done.stderr, done.stderr
    return done


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a file, a folder and a pipe that nobody writes to; change into it."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"\xff")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("hintfleet", "run", "folder"), 2, "spec folder: Is a directory"),
        (("hintfleet", "run", "file"), 2, "not UTF-8"),
        (("hintfleet", "run", "pipe"), 2, "pipe:1:1: the file is empty"),
        (("hintfleet", "run", "/dev/zero"), 2, "larger than 1048576 bytes"),
        (("hintfleet", "run", "x" * 300), 2, "File name too long"),
        (
            ("hintfleet", "run", "quickstart", "--host", LONG),
            2,
            "has 120 bytes, and the kernel allows 107",
        ),
        (("hintfleet", "run", "quickstart", "--data-dir", "file/x"), 1, "Not a directory"),
        (("hintfleet", "runs", "--data-dir", "/proc/x"), 1, "cannot use /proc/x: No such"),
        (("hintfleet", "savings", "--server", LONG), 2, "has 120 bytes, and the kernel allows 107"),
        (("hintfleet", "serve", "--listen", LONG), 2, "has 120 bytes, and the kernel allows 107"),
        (("hintfleet", "serve", "--listen", "unix-abstract:x"), 2, "listen on unix-abstract:x: an"),
        (("hintfleet", "serve", "--listen", "unix:file"), 1, "unix:file: Address already in use"),
        (("hintfleet", "compare", "a", "b", "--data-dir", "file/x"), 1, "Not a directory"),
        (("hintfleet", "export", "--to", "folder"), 2, "is a directory"),
        (("hintfleet", "serve", "--data-dir", "/proc/x"), 1, "cannot use /proc/x: No such"),
        (("hintfleet", "pki", "init", "--folder", "file/x"), 1, "Not a directory"),
        (("hintfleet", "pki", "show", "/dev/zero"), 2, "larger than"),
        (("hintfleet", "savings", "--server", "127.0.0.1:1", "--tls", "file"), 2, "TLS folder"),
        (("hintfleet-host", "--listen", LONG), 2, "has 120 bytes, and the kernel allows 107"),
        (("hintfleet-host", "--listen", "unix:file/s"), 1, "the socket's folder file: "),
        (("hintfleet-host", "--listen", "unix:/proc/x/s"), 1, "folder /proc/x: No such file"),
        (("hintfleet-host", "--listen", "unix:folder"), 1, "unix:folder: Address already in use"),
        (("hintfleet-host", *ANYWHERE, "--state", "file"), 1, "file: Not a directory"),
        (("hintfleet-host", *ANYWHERE, "--state", "/proc/x"), 1, "state in /proc/x: No such file"),
        (("hintfleet-host", *ANYWHERE, "--tls", "file"), 2, "ca.pem: Not a directory"),
        (("hintfleet-host", *ANYWHERE, "--ready-fd", "99"), 1, "Bad file descriptor"),
        (("hintfleet-guest", "--config", "/dev/zero"), 2, "/dev/zero: larger than 65536 bytes"),
        (("hintfleet-guest", "--config", "pipe"), 2, "is not JSON"),
        (("hintfleet-guest", "--config", "file"), 2, "configuration file: 'utf-8' codec"),
        (("hintfleet-guest", "--config", "folder"), 2, "folder: Is a directory"),
    ],
)
def test_mistakes_in_what_users_name(
    command: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    done = ran(*command)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for command in (
            ("hintfleet", "serve", "--data-dir", ".", "--listen", address),
            ("hintfleet-host", "--listen", address),
            ("hintfleet-host", *ANYWHERE, "--guest-listen", address),
            ("hintfleet-host", *ANYWHERE, "--metrics", address),
        ):
            done = ran(*command)
            assert done.returncode == 1
            assert f"{address}: Address already in use" in done.stderr


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
def test_folders_of_somebody_else(folder: Path) -> None:
    Path("secret.yaml").touch(0o600)
    for path in (folder, folder / "secret.yaml"):
        os.chown(path, 65534, 65534)
    for command in (
        ("hintfleet", "runs", "--data-dir", "data"),
        ("hintfleet", "run", "secret.yaml", "--data-dir", "data"),
        ("hintfleet", "pki", "init", "--folder", "pki"),
        ("hintfleet-host", "--listen", "unix:new/socket"),
        ("hintfleet-host", "--listen", "unix:socket"),
        ("hintfleet-host", *ANYWHERE, "--state", "state"),
    ):
        # Without capabilities, root is subject to permissions like other users.
        done = ran(*command, within=("setpriv", "--inh-caps=-all", "--bounding-set=-all"))
        assert done.returncode in (1, 2)
        assert "Permission denied" in done.stderr, command


COMMANDS = (
    ("hintfleet",),
    ("hintfleet", "--version"),
    ("hintfleet", "run", "--help"),
    ("hintfleet", "experiments"),
    ("hintfleet", "experiments", "quickstart"),
    ("hintfleet", "runs", "--data-dir", "store"),
    ("hintfleet", "show", "--data-dir", "store"),
    ("hintfleet", "show", "--spec", "--data-dir", "store"),
    ("hintfleet", "savings", "-o", "json", "--data-dir", "store"),
    ("hintfleet", "savings", "-o", "yaml", "--data-dir", "store"),
    ("hintfleet", "export", "--data-dir", "store"),
    ("hintfleet", "export", "-o", "parquet", "--data-dir", "store"),
    ("hintfleet", "pki", "init", "--folder", "pki"),
    ("hintfleet-host", "--doctor", "--libvirt-uri", "test:///default"),
    ("hintfleet-host", "--help"),
    ("hintfleet-guest", "--version"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_output_that_cannot_be_written(command: tuple[str, ...]) -> None:
    text = load("quickstart").document.text
    store_run(Path("store"), spec_text=text, overrides={})
    full = ran(*command, redirect=">/dev/full")
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert "stdout: No space left on device" in full.stderr
    shutil.rmtree("pki", ignore_errors=True)
    closed = ran(*command, redirect=">&-")
    assert closed.returncode == 1
    assert "stdout: Bad file descriptor" in closed.stderr
    shutil.rmtree("pki", ignore_errors=True)
    unread = ran(*command, redirect="| sleep 0; exit ${PIPESTATUS[0]}")
    assert (unread.returncode in (0, 1), unread.stderr) == (True, ""), (
        "0 if read before the reader ended"
    )


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_messages_that_cannot_be_written(where: str) -> None:
    done = ran("hintfleet", "show", "nothing", "--data-dir", ".", redirect=where)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_closed_descriptor_is_not_reused_by_a_database() -> None:
    store_run(Path("store"))
    before = Path("store/hintfleet.sqlite").read_bytes()
    ran("hintfleet", "show", "--data-dir", "store", redirect="0>&- >&- 2>&-")
    assert Path("store/hintfleet.sqlite").read_bytes() == before


BUG = """
import sys
from {module} import __main__ as program
program.{place} = lambda *_: {{}}["missing"]
sys.argv[1:] = {arguments!r}
program.main()
"""


@pytest.mark.parametrize(
    ("program", "place", "arguments"),
    [
        ("hintfleet", "_command", ["runs"]),
        ("hintfleet-host", "_serve", []),
        ("hintfleet-guest", "_avoid_huge_pages", ["--config", "-"]),
    ],
)
def test_a_bug_is_one_message_and_a_file(
    program: str, place: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "folder"))
    code = BUG.format(module=PROGRAMS[program], place=place, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    (log,) = Path("folder").iterdir()
    assert done.returncode == 1
    assert done.stderr.startswith(f"{program}: a bug in hintfleet: KeyError: 'missing'\n")
    assert f"the details are in {folder / log}\n  try: send that file" in done.stderr
    assert "Traceback" not in done.stderr
    written = log.read_text()
    assert "Traceback" in written
    assert "grpcio" in written
    assert f"argv: {['-c', *arguments]}\n" in written
    assert log.stat().st_mode & 0o077 == 0


LOGGED = """
import logging, threading
from hintfleet import program
program.prepare("hintfleet-host")
def fail(): raise KeyError("missing")
for _ in range(50):
    thread = threading.Thread(target=fail); thread.start(); thread.join()
try: fail()
except KeyError: logging.getLogger("asyncio").exception("of a callback")
"""


def test_bugs_of_threads_and_callbacks_are_told_alike_and_are_bounded(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "folder"))
    done = subprocess.run(
        [sys.executable, "-c", LOGGED], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert "Traceback" not in done.stderr
    (log,) = Path("folder").iterdir()
    assert log.read_text().count("Traceback") == done.stderr.count("a bug in hintfleet") == 20


FATAL = LOGGED.replace("logging.getLogger", "program.run(fail, print, ''); logging.getLogger")


def test_the_bug_that_ends_a_program_is_told_however_many_there_were(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "folder"))
    done = subprocess.run(
        [sys.executable, "-c", FATAL], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.stdout.count("a bug in hintfleet") == 1
    assert done.stderr.count("a bug in hintfleet") == 20


@pytest.mark.parametrize("program", ["guest_agent", "host_agent", "orchestrator"])
def test_what_takes_long_to_import_is_not_imported_before_ctrl_c_is_ready(program: str) -> None:
    code = f"import sys, {program}.__main__; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_module_that_is_not_installed() -> None:
    code = "import sys; sys.modules['click'] = None\nimport orchestrator.__main__ as p; p.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 1
    assert "click" in done.stderr
    assert done.stderr.endswith("try: pip install 'hintfleet[orchestrator]'\n")


def test_control_characters_are_not_printed() -> None:
    done = ran("hintfleet", "show", "\x1b[31mred\x07", "--data-dir", ".")
    assert "\x1b" not in done.stderr
    done = ran("hintfleet", "run", "\x1b[31mred\x07/spec.yaml", "--data-dir", ".")
    assert "\x1b" not in done.stderr

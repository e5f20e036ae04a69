"""The outermost frame of every program: its exit code, and what its user is told.

Whatever ends a program, its user reads a plain message, never a traceback. What nobody has
foreseen is a bug of ours: the traceback goes to a file, and the message says which.

Imports nothing but the standard library, so that it can also say what is not installed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO

_STDOUT = "stdout"
_FAILED = 1
_INTERRUPTED = 130
_MOST_REPORTS = 20
"""A daemon may meet the same bug again and again."""

_STEERING = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) - {"\n", "\t"}
"""C0 and C1 control characters, of which terminals make commands."""

Tell = Callable[[str], None]


def run(command: Callable[[], int | None], tell: Tell, needs: str) -> int:
    """Run a program's `command`; returns its exit code. What went wrong is told.

    :param needs: what to install, for whom a module is missing.
    """
    try:
        code = _code_of(command)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - nothing is outside of this
        _drop_stdout()
        return _explain(error, tell, needs)
    return code


def prepare(program: str) -> Tell:
    """Make this process fit for `run`: streams that are all there, and errors of background
    threads, callbacks and gRPC's handlers told like others. Returns what tells on stderr."""
    # gRPC's core prints what it returns as an error, too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _open_missing_descriptors()
    sys.stdout, sys.stderr = (
        _text(_Stream(fd, name)) for fd, name in ((1, _STDOUT), (2, "stderr"))
    )

    def tell(message: str) -> None:
        say(f"{program}: {message}")

    logging.lastResort = _LoggedBugs(tell)
    threading.excepthook = lambda found: _tell_bug(found.exc_value or SystemError(), tell)
    return tell


def say(message: str) -> None:
    """Print on stderr, if that can still be written to."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _to_null(sys.stderr)


def printable(text: str) -> str:
    """`text` without what would steer a terminal: a path or a guest's words may hold it."""
    return "".join("\N{REPLACEMENT CHARACTER}" if c in _STEERING else c for c in text)


def _code_of(command: Callable[[], int | None]) -> int:
    try:
        return int(command() or 0)
    except SystemExit as ended:  # argparse and click end a program so, having told why
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _explain(error: BaseException, tell: Tell, needs: str) -> int:
    """Tell what ended the program; returns the exit code for it."""
    if isinstance(error, BrokenPipeError) and error.filename == _STDOUT:
        return _FAILED  # whoever read our output has had enough; nothing is left to say
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return _INTERRUPTED
    if isinstance(error, ImportError) and not _is_ours(error.name):
        tell(f"{error}\n  try: pip install '{needs}'")
        return _FAILED
    from hintfleet.errors import HintfleetError  # late: it needs gRPC

    if isinstance(error, HintfleetError):
        tell(str(error))
        return int(error.exit_code)
    if isinstance(error, MemoryError):
        tell("the machine has no memory left for it")
    elif isinstance(error, OSError) and error.errno is not None:
        tell(": ".join(str(part) for part in (error.filename, error.strerror) if part))
    else:
        _tell_bug(error, tell, fatal=True)
    return _FAILED


def _is_ours(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in ("hintfleet", "guest_agent", "host_agent", "orchestrator")


_reports: list[str] = []
"""For each bug that this process has met, the file with it; empty if there is none."""


def _tell_bug(error: BaseException, tell: Tell, *, fatal: bool = False) -> None:
    """:param fatal: the program ends by it, so that it is told however many there were."""
    if len(_reports) >= _MOST_REPORTS and not fatal:
        return
    found = bug_fields(error)
    if "details" in found:
        tell(
            f"a bug in hintfleet: {found['bug']}\n  the details are in {found['details']}\n"
            "  try: send that file, and what you did, to where you have hintfleet from"
        )
    else:
        tell(f"a bug in hintfleet: {found['bug']}\n{found['trace']}")


def bug_fields(error: BaseException) -> dict[str, str]:
    """Say what went wrong as `bug`, and in which file its traceback is as `details`; where no
    file can be written, the traceback itself is there as `trace`."""
    import traceback

    what = traceback.format_exception_only(error)[-1].strip()
    if len(_reports) > _MOST_REPORTS:
        return {"bug": what, "details": _reports[-1]}
    report = _report("".join(traceback.format_exception(error)))
    try:
        _reports.append(_append(report))
    except OSError as failed:
        _reports.append("")
        trace = f"{report}  (no file can be written: {failed.strerror})"
        return {"bug": what, "trace": trace}
    return {"bug": what, "details": _reports[-1]}


def _report(trace: str) -> str:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from hintfleet import __version__

    lines = [
        f"hintfleet {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"argv: {sys.argv!r}",
    ]
    for name in ("grpcio", "protobuf", "ray", "duckdb", "click", "rich", "libvirt-python"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join((*lines, trace))


def _append(report: str) -> str:
    import tempfile

    path = _reports[-1] if _reports else ""
    if os.path.lexists(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    else:  # the first one, or somebody cleans the temporary folder
        fd, path = tempfile.mkstemp(prefix="hintfleet-bug-", suffix=".log")
    with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(report)
    return path


class _LoggedBugs(logging.Handler):
    """What no other handler wants, as asyncio and gRPC log what our code raised in them."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            self._tell(record.getMessage())
        else:
            _tell_bug(error, self._tell)


class _Stream(FileIO):
    """Stdout or stderr, whose errors say which it is."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, "w", closefd=False)
        self._said = name

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            error.filename = self._said
            raise


def _text(stream: _Stream) -> TextIOWrapper:
    """File names need not be text: as UTF-8 they come out as the bytes that they are."""
    encoding = getattr(sys.stdout or sys.stderr, "encoding", "utf-8")
    utf8 = encoding.lower().replace("-", "") == "utf8"
    return TextIOWrapper(
        BufferedWriter(stream),
        encoding,
        errors="surrogateescape" if utf8 else "backslashreplace",
        line_buffering=stream.isatty() or stream.fileno() == 2,
    )


def _open_missing_descriptors() -> None:
    """Have descriptors 0 to 2 refer to something, as they do not after `>&-`: else the next
    file that is opened, maybe a database, would be stdout to whoever writes there."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Stdout for reading only: that output is lost is an error, as in other programs.
            os.open(os.devnull, os.O_RDWR if fd == 2 else os.O_RDONLY)  # the lowest: fd


def _drop_stdout() -> None:
    """What stdout does not take must not fail once more when the interpreter ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _to_null(sys.stdout)


def _to_null(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # not a real one
        fd = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)

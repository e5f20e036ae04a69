"""The outermost frame of every program: its exit code (errors.py has the codes of errors), and
the messages to its user.

An error that ends a program is reported as a plain message; only if the reader of stdout has closed
it, as `head` does, nothing is reported. An error that we did not foresee is a bug of ours: its
traceback is written to a file, and the message names the file. Only if no file can be written, the
message contains the traceback. A bug in a background thread, a callback or a gRPC handler is
reported in the same way, but does not end the program.

When it is loaded, this module imports only the standard library, so that it can also report a
package that is not installed.
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
"""Limits the bug reports of one process: a daemon may hit the same bug again and again."""

_CONTROL_CHARACTERS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) - {"\n", "\t"}
"""C0 and C1 control characters and DEL, except newline and tab: terminals act on them."""

Tell = Callable[[str], None]


def run(command: Callable[[], int | None], tell: Tell, needs: str) -> int:
    """Run a program's `command`; return the exit code. Raises nothing: `tell` prints errors.

    :param command: returns an exit code; None means 0.
    :param tell: prints a message to the user.
    :param needs: the package to install with pip if a module is missing.
    """
    try:
        code = _code_of(command)
        # Flush here: the interpreter, which flushes stdout as it ends, would print an error of that
        # as "Exception ignored in".
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the outermost frame of the program
        _drop_stdout()
        return _explain(error, tell, needs)
    return code


def prepare(program: str) -> Tell:
    """Prepare this process for `run`; return the function that prints messages on stderr.

    Afterwards descriptors 0 to 2 are open, and an unforeseen error in a background thread, a
    callback or a gRPC handler is reported as a bug, too.
    """
    # Without this setting, gRPC's core prints its errors on stderr, besides returning them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _open_missing_descriptors()
    sys.stdout, sys.stderr = (
        _text(_Stream(fd, name)) for fd, name in ((1, _STDOUT), (2, "stderr"))
    )

    def tell(message: str) -> None:
        say(f"{program}: {message}")

    # asyncio and gRPC log exceptions of callbacks and RPC handlers. While no log handler is
    # configured, logging.lastResort would print them with a traceback.
    logging.lastResort = _LoggedBugs(tell)
    threading.excepthook = lambda found: _tell_bug(found.exc_value or SystemError(), tell)
    return tell


def say(message: str) -> None:
    """Print on stderr, with control characters replaced, except newlines and tabs.

    If stderr cannot be written to, redirect it to /dev/null.
    """
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _to_null(sys.stderr)


def printable(text: str) -> str:
    """Return `text` with all control characters replaced, except newlines and tabs."""
    # A path or a guest's message may contain some, and a terminal would act on them.
    return "".join("\N{REPLACEMENT CHARACTER}" if c in _CONTROL_CHARACTERS else c for c in text)


def _code_of(command: Callable[[], int | None]) -> int:
    try:
        return int(command() or 0)
    # argparse raises SystemExit when it has printed an error or help; click when it has completed
    # a command line for a shell, and, without a message, when a pipe is closed.
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _explain(error: BaseException, tell: Tell, needs: str) -> int:
    """Print the error that ended the program; return the exit code.

    Prints nothing if the reader of stdout has closed it.
    """
    if isinstance(error, BrokenPipeError) and error.filename == _STDOUT:
        return _FAILED  # the reader of our output closed it on purpose, as `head` does
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return _INTERRUPTED
    if isinstance(error, ImportError) and not _is_ours(error.name):
        tell(f"{error}\n  try: pip install '{needs}'")
        return _FAILED
    from hintfleet.errors import HintfleetError  # only here: needs gRPC, which may be missing

    if isinstance(error, HintfleetError):
        tell(str(error))
        return int(error.exit_code)
    if isinstance(error, MemoryError):
        tell("out of memory: the machine has none left for this program")
    elif isinstance(error, OSError) and error.errno is not None:
        tell(": ".join(str(part) for part in (error.filename, error.strerror) if part))
    else:
        _tell_bug(error, tell, fatal=True)
    return _FAILED


def _is_ours(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in ("hintfleet", "guest_agent", "host_agent", "orchestrator")


_report_paths: list[str] = []
"""For each bug reported by this process, the report's path; empty if it could not be written."""


def _tell_bug(error: BaseException, tell: Tell, *, fatal: bool = False) -> None:
    """Print a message about a bug; do nothing after _MOST_REPORTS reports.

    :param fatal: the bug ends the program, so it is printed in any case.
    """
    if len(_report_paths) >= _MOST_REPORTS and not fatal:
        return
    found = bug_fields(error)
    if "details" in found:
        tell(
            f"a bug in hintfleet: {found['bug']}\n  the details are in {found['details']}\n"
            "  try: send that file to where you got hintfleet from, and say what you did"
        )
    else:
        tell(f"a bug in hintfleet: {found['bug']}\n{found['trace']}")


def bug_fields(error: BaseException) -> dict[str, str]:
    """Write a report of a bug to this process's report file; return fields for a log line.

    `bug` is the error, `details` the path of the file. If the file cannot be written, `trace` is
    the report itself, instead of `details`. After more than _MOST_REPORTS reports, no report is
    written, and `details` is the path of the last one that was, if there is one.
    """
    import traceback

    what = traceback.format_exception_only(error)[-1].strip()
    if len(_report_paths) > _MOST_REPORTS and any(_report_paths):
        return {"bug": what, "details": next(filter(None, reversed(_report_paths)))}
    report = _report("".join(traceback.format_exception(error)))
    try:
        _report_paths.append(_append(report))
    except OSError as failed:
        _report_paths.append("")
        return {"bug": what, "trace": f"{report}  (no file can be written: {failed.strerror})"}
    return {"bug": what, "details": _report_paths[-1]}


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

    path = _report_paths[-1] if _report_paths else ""
    # Every user can write to the temporary folder: do not follow a symbolic link that somebody put
    # in the place of our file.
    if os.path.lexists(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    else:  # there is no file: none was written yet, or somebody has removed it
        fd, path = tempfile.mkstemp(prefix="hintfleet-bug-", suffix=".log")
    with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(report)
    return path


class _LoggedBugs(logging.Handler):
    """Prints warnings and errors that are logged while no log handler is configured.

    A record with an exception is a bug that asyncio or gRPC has caught: it is reported as one.
    """

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
    """Stdout or stderr; an OSError of `write` has the stream's name as `filename`."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, "w", closefd=False)
        self._stream_name = name

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            error.filename = self._stream_name
            raise


def _text(stream: _Stream) -> TextIOWrapper:
    """Wrap a stream for text, in the encoding of sys.stdout."""
    encoding = getattr(sys.stdout or sys.stderr, "encoding", "utf-8")
    utf8 = encoding.lower().replace("-", "") == "utf8"
    # File names may be any bytes, which Python decodes with surrogateescape (PEP 383): print the
    # same bytes again.
    return TextIOWrapper(
        BufferedWriter(stream),
        encoding,
        errors="surrogateescape" if utf8 else "backslashreplace",
        line_buffering=stream.isatty() or stream.fileno() == 2,
    )


def _open_missing_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed, as after `>&-` in a shell."""
    # If 1 or 2 stayed closed, the next file that is opened, maybe a database, would get that
    # descriptor, and all output would be written to the file.
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Descriptor 1 is opened read-only, so that printing fails: as in other programs, lost
            # output is an error. open() returns the lowest free descriptor (open(2)): `fd`.
            os.open(os.devnull, os.O_RDWR if fd == 2 else os.O_RDONLY)


def _drop_stdout() -> None:
    """Flush stdout; if that fails, redirect it to /dev/null, and so discard the output."""
    # If stdout stayed as it is, the interpreter, which flushes it at the end, would print a second
    # error.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _to_null(sys.stdout)


def _to_null(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a stream without a descriptor, or a closed one
        fd = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)

"""Logs of all programs, by Python's standard logging. Our loggers are below `hintfleet`.

The message of an event is a fixed text; values that vary are fields (`guest`, `epoch`, ...). So
readers can search for the text, and for the value of a field:

    log.info("session welcomed", extra=fields(guest="g0", epoch=17))

In the line of an unforeseen error, the error follows the message. `LogRateLimit` leaves out events
that repeat too often.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from hintfleet import program

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

_FIELDS = "hintfleet_fields"
# sd-daemon(3): journald reads the priority of a line from a prefix <N>.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the argument `extra=` for a logging call, with these fields."""
    return {_FIELDS: values}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --log-level and --log-format, whose values `configure` takes.

    The command `hintfleet` has its own two, for click, and logs nothing by default:
    orchestrator/cli.py.
    """
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="what to log (default: %(default)s)"
    )
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="text with NAME=VALUE fields, or one JSON object per line (default: %(default)s)",
    )


def configure(level: str, style: str, **constant: object) -> None:
    """Write all log lines of this process to stderr, those of libraries included.

    :param level: one of LEVELS, for our loggers; libraries log warnings and errors.
    :param style: one of FORMATS. If journald reads stderr, text lines have its priority prefix
        instead of time and level.
    :param constant: fields of every line; those whose value is "" are left out.
    """
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter(_style_of(style), constant))
    root, ours = logging.getLogger(), logging.getLogger("hintfleet")
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    ours.setLevel(level.upper())


def are_configured() -> bool:
    """Return whether `configure` was called."""
    return bool(_handlers())


@contextmanager
def written_to(stream: TextIO) -> Iterator[None]:
    """Write log lines to `stream` instead of stderr until the block ends."""
    before = [(handler, handler.setStream(stream)) for handler in _handlers()]
    try:
        yield
    finally:
        for handler, earlier in before:
            handler.setStream(earlier or sys.stderr)


def _handlers() -> list[_Handler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Handler)]


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that `configure` sets; `_handlers` recognizes it by its class."""


_Style = Callable[[logging.LogRecord, str, dict[str, Any]], str]


class _Formatter(logging.Formatter):
    def __init__(self, style: _Style, constant: Mapping[str, object]) -> None:
        super().__init__()
        self._write = style
        self._constant = {name: value for name, value in constant.items() if value != ""}

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        values = self._constant | getattr(record, _FIELDS, {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            bug = program.bug_fields(error)
            message += f": a bug in hintfleet: {bug.pop('bug')}"
            values |= bug
        return self._write(record, message, values)


def _text(record: logging.LogRecord, message: str, values: dict[str, Any]) -> str:
    pairs = "".join(f" {name}={_quoted(value)}" for name, value in values.items())
    # Values may come from a guest, and the operator's terminal would act on control characters.
    return program.printable(f"{record.name}: {message}{pairs}")


def _timed_text(record: logging.LogRecord, message: str, values: dict[str, Any]) -> str:
    return f"{_time(record)} {record.levelname} {_text(record, message, values)}"


def _journal_text(record: logging.LogRecord, message: str, values: dict[str, Any]) -> str:
    # journald makes each line an entry of its own, and only the first would have the priority.
    line = _text(record, message, values).replace("\n", "\\n")
    return f"<{_PRIORITIES.get(record.levelno, 5)}>{line}"


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and not set(text) & set(' "\n=') else json.dumps(text, ensure_ascii=False)


def _json(record: logging.LogRecord, message: str, values: dict[str, Any]) -> str:
    head = {
        "time": _time(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": message,
    }
    return json.dumps(head | values, default=str)


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{record.msecs:03.0f}Z"


def _style_of(name: str) -> _Style:
    if name == "json":
        return _json
    return _journal_text if _is_journal() else _timed_text


def _is_journal() -> bool:
    """Return whether journald reads stderr."""
    # systemd sets JOURNAL_STREAM to device and inode of the journal's stream (systemd.exec(5)).
    # Compare them: a child whose stderr was redirected inherits the variable.
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LogRateLimit:
    """Limits an event to one log line per period, and counts the events that are not logged."""

    def __init__(self, period_s: float = 10.0) -> None:
        self._period_s = period_s
        self._next_s = 0.0
        self._left_out = 0

    def due(self) -> dict[str, int] | None:
        """Call for each event: return None if it must not be logged.

        Otherwise return fields for its log line: `more_not_logged`, the number of events that were
        not logged since the last line; {} if there were none.
        """
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._left_out += 1
            return None
        self._next_s = now_s + self._period_s
        left_out, self._left_out = self._left_out, 0
        return {"more_not_logged": left_out} if left_out else {}

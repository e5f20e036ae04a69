"""The format of log lines stays intact, whatever values they contain. Events that a rate limit
keeps out of the log are counted."""

import io
import json
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from hintfleet import logs
from hintfleet.logs import LogRateLimit, fields


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("hintfleet")
    before = root.handlers, root.level, ours.level
    yield
    root.handlers, root.level, ours.level = before


def written(style: str, monkeypatch: pytest.MonkeyPatch, **values: object) -> str:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure("info", style, host="h", empty="")
    logging.getLogger("hintfleet.part").info("it happened", extra=fields(**values))
    return stderr.getvalue()


def test_control_characters_of_a_guest_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = written("text", monkeypatch, said="\x1b[2Jgone\x07")
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "gone" in text


@pytest.mark.parametrize("value", ["", "a b", 'q"q', "a=b", "two\nlines"])
def test_a_value_that_holds_a_separator_is_quoted(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = written("text", monkeypatch, said=value)
    assert line.endswith(f" host=h said={json.dumps(value)}\n")
    assert line.count("\n") == 1


def test_json_is_one_line_and_keeps_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.loads(written("json", monkeypatch, epoch=7, said="two\nlines"))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "hintfleet.part",
        "message": "it happened",
        "host": "h",
        "epoch": 7,
        "said": "two\nlines",
    }


def test_events_that_are_not_logged_are_counted() -> None:
    often = LogRateLimit(period_s=0.05)
    assert often.due() == {}
    assert [often.due() for _ in range(3)] == [None] * 3
    time.sleep(0.05)
    assert often.due() == {"more_not_logged": 3}

"""The report of a bug is never lost: it is in a file, or in the fields of the log line."""

import errno
from pathlib import Path

import pytest

from hintfleet import program

MANY = 30
"""More bugs than one process writes reports of."""


def reported() -> dict[str, str]:
    try:
        raise ZeroDivisionError("a bug of the test")
    except ZeroDivisionError as error:
        return program.bug_fields(error)


@pytest.fixture(autouse=True)
def no_report_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "_report_paths", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_reports_are_in_one_file_which_stops_growing() -> None:
    found = [reported() for _ in range(MANY)]
    (path,) = {Path(fields["details"]) for fields in found}
    assert 1 < path.read_text().count("ZeroDivisionError: a bug of the test") < MANY


def test_where_no_file_can_be_written_each_bug_has_its_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    for fields in [reported() for _ in range(MANY)]:
        assert "details" not in fields
        assert "ZeroDivisionError: a bug of the test" in fields["trace"]
        assert "No space left on device" in fields["trace"]

"""Recorded memory use, which a workload replays: the model, and its files (CSV or Parquet)."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from hintfleet.errors import InvalidInput
from hintfleet.system.files import read_at_most
from orchestrator.spec.values import FileName, Part, invalid_value

MOST_POINTS = 10_000
_MOST_BYTES = 64 << 20
_LARGEST = 1 << 53  # integers up to here are exact in a double
_COLUMNS = ("time_s", "used_bytes")
_NUMBER = re.compile(r"[ \t]*[+-]?[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?[ \t]*")

_Point = tuple[float, float]


class Recording(Part):
    """How much memory something used over time.

    :ivar name: as `replay` names it; of a recording from a file, the file's.
    :ivar time_s, used_bytes: from when on how many bytes were used; one value for each point.
    :ivar sha256: of the file; empty if the spec itself contains the recording.
    """

    name: FileName
    time_s: tuple[Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)], ...]
    used_bytes: tuple[Annotated[int, Field(ge=0, le=_LARGEST)], ...]
    sha256: str = ""

    @model_validator(mode="after")
    def _is_a_series(self) -> Recording:
        if len(self.time_s) != len(self.used_bytes):
            raise invalid_value("time_s and used_bytes do not have the same length")
        if len(self.time_s) < 2:
            raise invalid_value("a recording has at least two points")
        if len(self.time_s) > MOST_POINTS:
            raise invalid_value(f"more than {MOST_POINTS} points", "leave out points, or split it")
        for number, (before, after) in enumerate(itertools.pairwise(self.time_s), 1):
            if not before < after:
                raise invalid_value(f"time_s does not grow from point {number} to {number + 1}")
        return self


def read_recording(path: Path, name: str) -> Recording:
    """Read a recording from a CSV or Parquet file with the columns `time_s` and `used_bytes`; other
    columns are ignored.

    :param name: of the recording, and in messages.
    :raises InvalidInput: the file cannot be read, or is not a valid recording; if one line or point
        is wrong, the message names it.
    """
    try:
        return parse_recording(read_at_most(path, _MOST_BYTES), name)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error


def parse_recording(content: bytes, name: str) -> Recording:
    """Parse the contents of a file; see `read_recording`.

    :raises InvalidInput: the contents are not a valid recording.
    """
    points = _parquet(content, name) if content.startswith(b"PAR1") else _csv(content, name)
    found = list(itertools.islice(points, MOST_POINTS + 1))
    try:
        return Recording(
            name=name,
            time_s=tuple(at_s for at_s, _ in found),
            used_bytes=tuple(int(used) for _, used in found),
            sha256=hashlib.sha256(content).hexdigest(),
        )
    except ValidationError as error:
        # About the whole recording: each point by itself was checked when it was read.
        problem = error.errors()[0]
        hint = problem.get("ctx", {}).get("hint", "")
        raise InvalidInput(f"{name}: {problem['msg']}", hint=hint) from None


def _csv(content: bytes, name: str) -> Iterator[_Point]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name}: neither Parquet nor CSV in UTF-8: {error}") from error
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [column.strip() for column in next(rows, [])]
        indexes = [_index(header, column, name) for column in _COLUMNS]
        for row in rows:
            if row:  # not an empty line
                where = f"{name}:{rows.line_num}"
                time_s, used = (_number(row, index, where) for index in indexes)
                yield _point(time_s, used, where)
    except csv.Error as error:
        raise InvalidInput(f"{name}:{rows.line_num}: not CSV: {error}") from error


def _index(header: list[str], column: str, name: str) -> int:
    if header.count(column) != 1:
        raise InvalidInput(
            f"{name}:1: the header must have the column {column} once",
            hint=f"it has {', '.join(header)[:200] or 'no columns'}",
        )
    return header.index(column)


def _number(row: list[str], index: int, where: str) -> float:
    text = row[index] if index < len(row) else ""
    # Not float() alone, which also takes nan, infinity and 1_000.
    if not _NUMBER.fullmatch(text):
        raise InvalidInput(f"{where}: {text[:40]!r} is not a number")
    return float(text)


def _point(time_s: float, used: float, where: str) -> _Point:
    if not abs(time_s) <= _LARGEST:
        raise InvalidInput(f"{where}: time_s is {time_s:g}")
    if not 0 <= used <= _LARGEST:
        raise InvalidInput(f"{where}: used_bytes is {used:g}")
    return time_s, used


def _parquet(content: bytes, name: str) -> Iterator[_Point]:
    import duckdb  # 0.4 s to import

    fd = os.memfd_create("recording")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        # DuckDB opens the memfd by a name without characters that DuckDB would interpret.
        with duckdb.connect(config={"threads": 1, "temp_directory": ""}) as connection:
            rows = connection.execute(
                "SELECT CAST(time_s AS DOUBLE), CAST(used_bytes AS DOUBLE) "
                "FROM read_parquet(?) LIMIT ?",
                [f"/proc/self/fd/{fd}", MOST_POINTS + 1],
            ).fetchall()
    except duckdb.Error as error:
        said = str(error).splitlines()[0]
        raise InvalidInput(
            f"{name}: cannot be read as Parquet with the columns {' and '.join(_COLUMNS)}: {said}"
        ) from error
    finally:
        os.close(fd)
    for number, (time_s, used) in enumerate(rows, 1):
        where = f"{name}: row {number}"
        if time_s is None or used is None:
            raise InvalidInput(f"{where} has no {_COLUMNS[time_s is not None]}")
        yield _point(time_s, used, where)

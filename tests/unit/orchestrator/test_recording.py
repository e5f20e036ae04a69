"""Recordings in files: what is read, and what is said about a file that has none."""

from pathlib import Path

import duckdb
import pytest

from hintfleet.errors import InvalidInput
from orchestrator.spec.recording import MOST_POINTS, parse_recording, read_recording

CSV = b"time_s,used_bytes\n0,10\n"


@pytest.mark.parametrize(
    ("content", "points"),
    [
        (b"time_s,used_bytes\n0,10\n300,20.7\n\n600, 1e6\n", [(0, 10), (300, 20), (600, 10**6)]),
        (b"\xef\xbb\xbfcpu, used_bytes ,time_s\r\n1,5,-3\r\n1,6,1\r\n", [(-3, 5), (1, 6)]),
        (b'time_s,used_bytes,note\n"0","1","a, b"\n1,2', [(0, 1), (1, 2)]),
    ],
)
def test_a_csv_file(content: bytes, points: list[tuple[float, int]]) -> None:
    recording = parse_recording(content, "day.csv")
    assert list(zip(recording.time_s, recording.used_bytes, strict=True)) == points
    assert len(recording.sha256) == 64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "day.csv:1: the header must have the column time_s once"),
        (b"time_s,used\n0,10\n", "day.csv:1: the header must have the column used_bytes once"),
        (b"time_s,time_s,used_bytes\n", "day.csv:1: the header must have the column time_s once"),
        (CSV, "day.csv: a recording has at least two points"),
        (CSV + b"0,20\n", "day.csv: time_s does not grow from point 1 to 2"),
        (CSV + b"-1,20\n", "day.csv: time_s does not grow from point 1 to 2"),
        (CSV + b"1,-20\n", "day.csv:3: used_bytes is -20"),
        (CSV + b"1,nan\n", "day.csv:3: 'nan' is not a number"),
        (CSV + b"1,0x10\n", "day.csv:3: '0x10' is not a number"),
        (CSV + b"1,1_0\n", "day.csv:3: '1_0' is not a number"),
        (CSV + b"1,\x1e1\n", "day.csv:3: '\\x1e1' is not a number"),
        (CSV + b"1\n", "day.csv:3: '' is not a number"),
        (CSV + b"9e99,1\n", "day.csv:3: time_s is 9e+99"),
        (CSV + b"1,9e99\n", "day.csv:3: used_bytes is 9e+99"),
        (CSV + b'1,"' + b"x" * 200_000, "day.csv:3: not CSV: field larger than field limit"),
        (b"\xff\xfe", "day.csv: neither Parquet nor CSV in UTF-8"),
        (b"PAR1", "day.csv: cannot be read as Parquet with the columns time_s and used_bytes: "),
    ],
)
def test_what_is_wrong_with_a_file(content: bytes, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_recording(content, "day.csv")
    assert caught.value.message.startswith(said)


def test_points_are_limited() -> None:
    rows = b"".join(b"%d,1\n" % number for number in range(1, MOST_POINTS))
    assert len(parse_recording(CSV + rows, "long.csv").time_s) == MOST_POINTS
    with pytest.raises(InvalidInput, match="more than 10000 points"):
        parse_recording(CSV + rows + b"99999,1\n", "long.csv")


def parquet(tmp_path: Path, query: str) -> Path:
    path = tmp_path / "day.parquet"
    duckdb.connect().execute(f"COPY ({query}) TO '{path}' (FORMAT parquet)")
    return path


def test_a_parquet_file(tmp_path: Path) -> None:
    query = "SELECT * FROM (VALUES (0, 7, 'a'), (60, 8, 'b')) t(time_s, used_bytes, host)"
    recording = read_recording(parquet(tmp_path, query), "day.parquet")
    assert (recording.time_s, recording.used_bytes) == ((0.0, 60.0), (7, 8))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT 0 AS time_s, 1 AS used", '"used_bytes" not found'),
        ("SELECT 'a' AS time_s, 1 AS used_bytes", "Could not convert"),
        ("SELECT 0 AS time_s, NULL::INT AS used_bytes", "day.parquet: row 1 has no used_bytes"),
        ("SELECT 0 AS time_s, 'nan'::FLOAT AS used_bytes", "row 1: used_bytes is nan"),
    ],
)
def test_what_is_wrong_with_a_parquet_file(tmp_path: Path, query: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_recording(parquet(tmp_path, query), "day.parquet")
    assert said in caught.value.message


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = parquet(tmp_path, "SELECT 0 AS time_s, 1 AS used_bytes").read_bytes()
    with pytest.raises(InvalidInput, match="cannot be read as Parquet"):
        parse_recording(whole[: len(whole) // 2], "day.parquet")

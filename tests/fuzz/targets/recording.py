"""The reader of recordings in CSV: it returns points that can be replayed, and that stay the same
if they are written and read again; or it raises an error that names the file."""

from __future__ import annotations

import itertools
import math

from hintfleet.errors import InvalidInput
from orchestrator.spec.recording import MOST_POINTS, parse_recording
from tests.fuzz.target import Target


def try_input(data: bytes) -> None:
    if data.startswith(b"PAR1"):
        return  # a Parquet file, which DuckDB would read
    try:
        recording = parse_recording(data, "fuzzed.csv")
    except InvalidInput as error:
        _names_the_file(error)
        return
    assert 2 <= len(recording.time_s) == len(recording.used_bytes) <= MOST_POINTS
    assert all(math.isfinite(at_s) for at_s in recording.time_s)
    assert all(a < b for a, b in itertools.pairwise(recording.time_s))
    assert all(0 <= used <= 1 << 53 for used in recording.used_bytes)
    points = zip(recording.time_s, recording.used_bytes, strict=True)
    rows = "".join(f"{at_s!r},{used}\n" for at_s, used in points)
    again = parse_recording(f"time_s,used_bytes\n{rows}".encode(), "written.csv")
    assert (again.time_s, again.used_bytes) == (recording.time_s, recording.used_bytes)


def _names_the_file(error: InvalidInput) -> None:
    str(error).encode()
    assert error.message.startswith("fuzzed.csv:")


TARGET = Target.of(
    try_input,
    seeds=(
        b"time_s,used_bytes\n0,1048576\n300,2097152\n600,0\n",
        b'\xef\xbb\xbfhost;x, used_bytes ,time_s\r\na,1e6,0.5\r\n"b",2.5e6,1.25\r\n',
    ),
    words=(
        "time_s",
        "used_bytes",
        ",",
        '"',
        "\r\n",
        "\n",
        "1e308",
        "-",
        ".5",
        "nan",
        "\x00",
        "\u2028",
    ),
    quick_runs=20_000,
)

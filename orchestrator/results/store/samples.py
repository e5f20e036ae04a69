"""Writes samples as Parquet parts, and reads them, with DuckDB.

A part is written under another name, synced and renamed: so a file with the name of a part is
always whole. DuckDB is used because it writes Parquet from numpy arrays without pyarrow.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hintfleet.errors import Refused
from orchestrator.results.footprint import Series
from orchestrator.results.store.database import storage_error
from orchestrator.trial.records import Columns, Samples

if TYPE_CHECKING:
    import duckdb

# The suffix of a part that is being written. Nothing reads such files: parts are `*.parquet`.
UNFINISHED = ".unfinished"
_PART_PERIOD_S = 2.0
RESIDENT_PARTS = ("used", "file_cache", "held_back", "in_flight", "waiting", "free_pieces")
"""Of ResidentParts (host.proto): what a guest's resident memory consists of, without what is
unexplained."""


class PartWriter:
    """Buffers a trial's samples and writes them as parts.

    :ivar part_count: how many parts were written to disk so far.
    """

    def __init__(self, folder: Path) -> None:
        """:param folder: the trial's folder; created with the first part."""
        self.part_count = 0
        self._folder = folder
        self._buffered: list[Samples] = []
        self._flushed_at_s = time.monotonic()

    def add(self, samples: Samples) -> None:
        """Buffer samples."""
        self._buffered.append(samples)

    @property
    def is_due(self) -> bool:
        """Whether 2 s have passed since the last flush; if there was none, since `__init__`."""
        return time.monotonic() - self._flushed_at_s >= _PART_PERIOD_S

    def flush(self) -> int:
        """Write the buffered samples, if there are any, as a part; return their number.

        After an error the buffered samples are lost, but earlier parts are intact.

        :raises LimitExceeded: the disk is full.
        :raises Refused: the part cannot be written.
        """
        self._flushed_at_s = time.monotonic()
        buffered, self._buffered = self._buffered, []
        if buffered:
            write_part(self._folder, self.part_count + 1, buffered)
            self.part_count += 1
        return sum(samples.row_count for samples in buffered)


def write_part(folder: Path, number: int, batches: Sequence[Samples]) -> Path:
    """Write samples as part `number` of a trial; return its path when it is on disk.

    After an error, earlier parts are intact.

    :raises LimitExceeded: the disk is full.
    :raises Refused: the part cannot be written.
    """
    part = folder / f"{number:06}.parquet"
    unfinished = part.with_suffix(UNFINISHED)
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            # fsync of a file or folder does not sync its name (fsync(2)). So the parent is synced
            # after a new folder is made here, and the folder after the rename below.
            _sync(folder.parent)
        with path_for_duckdb(folder) as plain:
            _copy_to(f"{plain}/{unfinished.name}", _table(batches))
        _sync(unfinished)
        unfinished.rename(part)
        _sync(folder)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError | duckdb_error()):
            raise storage_error(part, error) from error
        raise
    return part


def parts_in(folder: Path) -> list[Path]:
    """Return the parts of a trial, in the order in which they were written."""
    return sorted(folder.glob("*.parquet"))


def read_series(
    folder: Path, hosts: Sequence[str], counters: Sequence[str] = ()
) -> dict[str, dict[str, Series]]:
    """Return the samples of these hosts in a trial by host and guest, from all parts in `folder`.

    A host without samples is not in the result.

    :param counters: columns to read besides `resident_bytes`.
    :raises Refused: a part is damaged, or cannot be read.
    """
    parts = parts_in(folder)
    if not parts:
        return {}
    columns = ", ".join(("at_unix_us", "resident_bytes", *counters))
    source = "FROM read_parquet(?) WHERE list_contains(?, host)"
    try:
        with path_for_duckdb(folder) as plain, connect() as connection:
            values = [[f"{plain}/{part.name}" for part in parts], list(hosts)]
            # The names in a query of their own: in each row, two of them take 260 bytes, and a day
            # of fifty guests has tens of millions of rows.
            guests = connection.execute(
                f"SELECT host, guest, count(*) {source} GROUP BY ALL ORDER BY host, guest",
                values,
            ).fetchall()
            rows = connection.execute(
                f"SELECT {columns} {source} ORDER BY host, guest, at_unix_us",
                values,
            ).fetchnumpy()
    except (OSError, duckdb_error()) as error:
        raise Refused(f"cannot read samples of {folder.name}: {error}") from error
    found: dict[str, dict[str, Series]] = {}
    end = 0
    for host, guest, count in guests:
        start, end = end, end + count
        found.setdefault(host, {})[guest] = Series(
            at_unix_us=rows["at_unix_us"][start:end],
            resident_bytes=rows["resident_bytes"][start:end],
            counters={counter: rows[counter][start:end] for counter in counters},
        )
    return found


def mean_parts(folder: Path, start_us: int, end_us: int) -> dict[str, float]:
    """Return what resident memory consisted of in a trial, in bytes by the name in RESIDENT_PARTS:
    the mean over time of each guest from `start_us` to `end_us`, summed over all guests. Empty if
    no sample in that time has these figures: an older version wrote the samples, or no agent had
    sent them.

    :raises Refused: there is no part, or a part is damaged or cannot be read.
    """
    # A sample counts until the next one: at rest, most samples are left out (host.proto: Watch).
    means = ", ".join(f"sum(parts_{name}_bytes * us) / sum(us)" for name in RESIDENT_PARTS)
    try:
        with path_for_duckdb(folder) as plain, connect() as connection:
            files = f"{plain}/*.parquet"
            columns = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [files])
            if "parts_used_bytes" not in {row[0] for row in columns.fetchall()}:
                return {}
            guests = connection.execute(
                f"SELECT {means} FROM (SELECT *, lead(at_unix_us, 1, ?) OVER "  # noqa: S608 - ours
                "(PARTITION BY host, guest ORDER BY at_unix_us) - at_unix_us AS us "
                "FROM read_parquet(?) "
                "WHERE parts_used_bytes IS NOT NULL AND at_unix_us BETWEEN ? AND ?) "
                "GROUP BY host, guest HAVING sum(us) > 0",
                [end_us, files, start_us, end_us],
            ).fetchall()
    except (OSError, duckdb_error()) as error:
        raise Refused(f"cannot read samples of {folder.name}: {error}") from error
    sums = map(math.fsum, zip(*guests, strict=True))
    return dict(zip(RESIDENT_PARTS, sums, strict=False))


def _table(batches: Sequence[Samples]) -> Columns:
    joined: Columns = {}
    for name, first in batches[0].columns.items():
        # np.concatenate forgets the mask of a masked array.
        concatenate = np.ma.concatenate if np.ma.isMaskedArray(first) else np.concatenate
        joined[name] = concatenate([batch.columns[name] for batch in batches])
    return joined


@contextmanager
def path_for_duckdb(folder: Path) -> Iterator[str]:
    """Yield another name of `folder`, without characters that DuckDB interprets.

    Errors of DuckDB in the block are raised with `folder` in place of that name.
    """
    # DuckDB reads a path as UTF-8 text with a syntax: `[`, `*` and `?` are a glob, `host=a` is a
    # column (hive partitioning), `x://` is a remote file system. A user's folder may have any
    # of these in its name.
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    plain = f"/proc/self/fd/{fd}"
    try:
        yield plain
    except duckdb_error() as error:
        raise type(error)(str(error).replace(plain, str(folder))) from error
    finally:
        os.close(fd)


def _copy_to(path: str, table: Columns) -> None:
    with connect() as connection:
        connection.register("batch", table)
        connection.execute(f"COPY batch TO '{path}' (FORMAT parquet)")


def connect() -> duckdb.DuckDBPyConnection:
    """Return a connection to DuckDB, with no tables; a context manager that closes it."""
    connection = _database().cursor()
    # Where Python seems to be interactive (`python -c`), DuckDB would write a bar to stdout.
    connection.execute("SET enable_progress_bar = false")
    return connection


@cache
def _database() -> duckdb.DuckDBPyConnection:
    import duckdb  # 0.4 s to import

    # Opened once: that takes 20 to 30 ms of CPU time, and a run writes a part every 2 s.
    # With an empty temp_directory DuckDB makes no folder `.tmp` in the current folder.
    return duckdb.connect(config={"threads": 1, "temp_directory": ""})


def duckdb_error() -> type[Exception]:
    import duckdb

    return duckdb.Error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Exports what a run stored, as CSV or Parquet, with the run's parameters in each row.

DuckDB writes the rows into a pipe, and the caller writes the bytes that come out of it. So the
memory for samples does not grow with their number, DuckDB is given no path that a user has named,
and an error of writing is an error of Python, not of DuckDB.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from enum import StrEnum
from fcntl import F_SETPIPE_SZ, fcntl
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from hintfleet.errors import Refused
from hintfleet.settings import Method, hinting_parts
from orchestrator.results.capacity import Capacity
from orchestrator.results.cost import Cost
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.store.database import errors_mapped
from orchestrator.results.store.reader import Run, Store, StoredTrial
from orchestrator.results.store.samples import (
    connect,
    duckdb_error,
    parts_in,
    path_for_duckdb,
)
from orchestrator.spec.model import Spec

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

_CHUNK_BYTES = 1 << 20


class What(StrEnum):
    """The rows that can be exported."""

    SAMPLES = "samples"
    FOOTPRINTS = "footprints"
    EVENTS = "events"


class Format(StrEnum):
    """The format of an export."""

    CSV = "csv"
    PARQUET = "parquet"


_PARAMETERS = {
    "run_id": "VARCHAR",
    "experiment": "VARCHAR",
    "spec_hash": "VARCHAR",
    "driver": "VARCHAR",
    "seed": "BIGINT",
    "guest_memory_bytes": "BIGINT",
    "trial_id": "VARCHAR",
    "arm": "VARCHAR",
    "method": "VARCHAR",
    "policy": "VARCHAR",
    "tracker": "VARCHAR",
    "isolator": "VARCHAR",
    "repetition": "INTEGER",
    "attempt": "INTEGER",
    "status": "VARCHAR",
    "counted": "BOOLEAN",
}
"""The first columns of each row, and their types in DuckDB."""

_TYPES = {
    "int": "BIGINT",
    "float": "DOUBLE",
    "float | None": "DOUBLE",
    "bool": "BOOLEAN",
    "bool | None": "BOOLEAN",
    "tuple[float, ...]": "DOUBLE[]",
}
"""The types of fields that become columns, and the types of these columns in DuckDB."""


_SAMPLES = (
    "SELECT parse_path(filename)[-2] AS trial_id, * EXCLUDE (filename) "
    # So that no part of a path becomes a column, as `host=a` would.
    "FROM read_parquet(?, filename = true, hive_partitioning = false)"
)
_EVENTS = (
    "SELECT trial_id, host, json_extract_string(detail, '$.guest') AS guest, at_unix_us, kind, "
    "detail FROM stored"
)


def export(
    store: Store, run: Run, what: What, file_format: Format, spec: Spec | None
) -> Generator[bytes]:
    """Yield the bytes of a file with a row for each sample, footprint or event of a run.

    The rows are of all attempts at trials, also of those that are not counted, were cut off, or
    have not ended. Samples are in the order in which they were stored; the memory for them does
    not grow with their number.

    :param spec: the spec of the run; without it, the columns that depend on it are empty.
    :raises Refused: there are no rows, or samples are damaged or cannot be read.
    """
    trials = store.trials(run.run_id)
    folder = store.samples_dir(run.run_id)
    try:
        with path_for_duckdb(folder) as plain, connect() as connection:
            _register(connection, "trials", [_parameters(run, spec, trial) for trial in trials])
            if what is What.SAMPLES:
                stored: Sequence[Any] = _parts(connection, plain, folder, trials)
                rows = " UNION ALL BY NAME ".join([_SAMPLES] * len(stored))
            else:
                stored = _query(store, run, what)
                _register(connection, "stored", stored)
                rows = _EVENTS if what is What.EVENTS else _footprints()
            if not stored:
                raise Refused(f"run {run.run_id} has no {what}: it is {run.state}")
            values = stored if what is What.SAMPLES else ()
            yield from _copied(connection, rows, values, file_format)
    except (OSError, duckdb_error()) as error:
        raise Refused(f"cannot read the {what} of run {run.run_id}: {error}") from error


def _parameters(run: Run, spec: Spec | None, trial: StoredTrial) -> dict[str, object]:
    """Return the values of _PARAMETERS for one attempt at a trial."""
    of_spec = _parameters_of_spec(spec, trial.arm) if spec else {}
    return (
        dict.fromkeys(_PARAMETERS)
        | of_spec
        | {
            "run_id": run.run_id,
            "experiment": run.name,
            "spec_hash": run.spec_hash,
            "driver": run.driver,
            "trial_id": trial.trial_id,
            "arm": trial.arm,
            "repetition": trial.repetition,
            "attempt": trial.attempt,
            "status": str(trial.status),
            "counted": trial.counted,
        }
    )


def _parameters_of_spec(spec: Spec, name: str) -> dict[str, object]:
    variant = next(variant for variant in spec.variants if variant.arm.name == name)
    arm = variant.arm
    sizes = {one.memory_bytes for one in variant.classes}
    found: dict[str, object] = {
        "seed": spec.seed,
        "guest_memory_bytes": sizes.pop() if len(sizes) == 1 else None,
        "method": arm.method.value,
    }
    if spec.switchback:  # its guests keep the settings that they have
        return found
    parts = hinting_parts(spec.driver, arm.isolator, arm.tracker)
    if arm.method is not Method.HINTING or parts is None:
        return found
    return found | {
        "policy": arm.policy.value,
        "tracker": parts.tracker.value,
        "isolator": parts.isolator.value,
    }


def _query(store: Store, run: Run, what: What) -> list[dict[str, object]]:
    """Return the rows of footprints or events, in the order in which they were stored."""
    table, columns = {
        What.FOOTPRINTS: (
            "footprints",
            "host, guest, footprint, cost, capacity, footprints.undecided",
        ),
        What.EVENTS: ("events", "host, at_unix_us, kind, detail"),
    }[what]
    with errors_mapped(store.path):
        rows = store.database.execute(
            f"SELECT trial_id, {columns} FROM {table} JOIN trials USING (trial_id) "  # noqa: S608
            f"WHERE run_id = ? ORDER BY {table}.rowid",
            (run.run_id,),
        ).fetchall()
    return [dict(row) for row in rows]


def _parts(
    connection: duckdb.DuckDBPyConnection, plain: str, folder: Path, trials: Sequence[StoredTrial]
) -> list[list[str]]:
    """Return the paths of all parts in order, in groups that have the same columns.

    :param plain: another name of `folder`, for DuckDB.
    """

    def columns(paths: list[str]) -> list[Any]:
        # One part tells the columns of its trial, all parts of which one version of hintfleet has
        # written. Several versions may have written the trials of a resumed run.
        return connection.execute("DESCRIBE FROM read_parquet(?)", paths[:1]).fetchall()

    by_trial = [
        [f"{plain}/{trial.trial_id}/{part.name}" for part in parts_in(folder / trial.trial_id)]
        for trial in trials
    ]
    # DuckDB could unite parts with different columns by itself (union_by_name), but then it opens
    # all of them at once, and needs 60 KiB for each.
    groups = groupby(filter(None, by_trial), key=columns)
    return [list(chain.from_iterable(group)) for _, group in groups]


def _footprints() -> str:
    """Return a query of the rows in `stored`, with a column for each figure but those of loops."""
    columns = (
        "trial_id, host, guest, nullif(undecided, '') AS undecided",
        *_columns("footprint", Footprint),
        *_columns("json_extract(footprint, '$.returned')", Returned, "returned_"),
        *_columns("cost", Cost),
        *_columns("capacity", Capacity, "capacity_"),
    )
    return (
        f"SELECT {', '.join(columns)} FROM (SELECT * REPLACE ("  # noqa: S608 - names of our own
        "CAST(footprint AS VARCHAR) AS footprint, CAST(cost AS VARCHAR) AS cost, "
        "CAST(capacity AS VARCHAR) AS capacity) FROM stored)"
    )


def _columns(json_object: str, kind: type[Any], prefix: str = "") -> list[str]:
    """Return an SQL expression of a column for each field of `kind` whose type is a number, a truth
    value or a list of numbers.

    :param json_object: an expression of DuckDB whose value is a `kind` as a JSON object.
    :param prefix: what the columns' names begin with.
    """
    return [
        f"CAST(json_extract({json_object}, '$.{field.name}') AS {_TYPES[field.type]}) "
        f"AS {prefix}{field.name}"
        for field in fields(kind)
        if field.type in _TYPES
    ]


def _register(
    connection: duckdb.DuckDBPyConnection, name: str, rows: Sequence[Mapping[str, object]]
) -> None:
    """Make a table in DuckDB of rows, which all have the same keys; no table without rows."""
    if rows:
        table = {key: np.array([row[key] for row in rows], dtype=object) for key in rows[0]}
        connection.register(name, table)


def _copied(
    connection: duckdb.DuckDBPyConnection, rows: str, values: Sequence[object], file_format: Format
) -> Iterator[bytes]:
    """Yield the bytes of a file with the rows, each after the parameters of its trial.

    :raises duckdb.Error: the rows cannot be read; what was yielded is not a whole file.
    """
    parameters = ", ".join(
        f"CAST(trials.{name} AS {kind}) AS {name}" for name, kind in _PARAMETERS.items()
    )
    read_fd, write_fd = os.pipe()
    # A pipe has 64 KiB by default. One of 1 MiB is filled and emptied 16 times less often, which
    # saves a third of an export's CPU time. A user may not be allowed to enlarge it (pipe(7)).
    with suppress(OSError):
        fcntl(read_fd, F_SETPIPE_SZ, _CHUNK_BYTES)

    def copy() -> None:
        try:
            connection.execute(
                f"COPY (SELECT {parameters}, rows.* EXCLUDE (trial_id) "  # noqa: S608
                f"FROM ({rows}) AS rows JOIN trials USING (trial_id)) "
                f"TO '/proc/self/fd/{write_fd}' (FORMAT {file_format}, USE_TMP_FILE false)",
                values,
            )
        finally:
            os.close(write_fd)  # the reader then sees the end

    # If this generator is closed early, the read end of the pipe is closed before the thread is
    # waited for: so the thread fails to write, and ends.
    with ThreadPoolExecutor(1) as thread, open(read_fd, "rb", buffering=0) as pipe:
        done = thread.submit(copy)
        while chunk := pipe.read(_CHUNK_BYTES):
            yield chunk
        done.result()
